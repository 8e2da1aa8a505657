"""From token sequences to shuffled batches of activations, and back into the model."""

from spalf.activations.buffer import buffer_position, mixed_batches
from spalf.activations.fisher import fisher_information
from spalf.activations.patching import (
    Patched,
    next_token_cross_entropy,
    next_token_kl,
    patched_losses,
)
from spalf.activations.store import ActivationStore

__all__ = [
    "ActivationStore",
    "Patched",
    "buffer_position",
    "fisher_information",
    "mixed_batches",
    "next_token_cross_entropy",
    "next_token_kl",
    "patched_losses",
]
