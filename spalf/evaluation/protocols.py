"""The little that evaluation asks of a language model and of a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Progress = Callable[[int], object]
"""Called after each batch with the tokens it held, as ``tqdm.update`` wants them."""


class PatchableModel(Protocol):
    """A language model that can be read and patched at one site (`spalf.models.LanguageModel`)."""

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""
        ...

    def activations(self, tokens: Tensor) -> Tensor:
        """Activations at the site, ``[n_seq, seq_len, d_model]`` float32."""
        ...

    def patched_logits(self, tokens: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits ``[n_seq, seq_len, d_vocab]`` with the site's x replaced by patch(x)."""
        ...


class SparseCoder(Protocol):
    """A sparse autoencoder over flattened activations."""

    @property
    def W_dec(self) -> Tensor:
        """Decoder directions, ``[d_sae, d_model]``, of any common positive scale."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Codes z ≥ 0 ``[tokens, d_sae]`` of activations ``[tokens, d_model]``."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction ``[tokens, d_model]`` of codes ``[tokens, d_sae]``."""
        ...


class ScalableCoder(SparseCoder, Protocol):
    """A sparse autoencoder whose thresholds can be scaled."""

    def scaled_thresholds(self, factor: float) -> SparseCoder:
        """The same autoencoder with every threshold multiplied by ``factor``."""
        ...


class Measurement(Protocol):
    """A measurement taken batch by batch, which can be left and taken up between two of them."""

    def add(self, sequences: Tensor) -> None:
        """Take in one batch of tokens ``[n_seq, seq_len]``."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered so far."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; going on is then bit-identical."""
        ...

    def result(self) -> Any:
        """What came out, for JSON."""
        ...
