"""From token sequences to shuffled batches of activations, and back into the model."""

from spalf.activations.buffer import buffer_position, mixed_batches
from spalf.activations.divergence import next_token_cross_entropy, next_token_kl
from spalf.activations.fisher import fisher_information
from spalf.activations.store import ActivationStore

__all__ = [
    "ActivationStore",
    "buffer_position",
    "fisher_information",
    "mixed_batches",
    "next_token_cross_entropy",
    "next_token_kl",
]
