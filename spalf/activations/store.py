"""Activations of one site, harvested from a language model block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spalf.activations.buffer import mixed_batches
from spalf.data import SequenceStream
from spalf.models import LanguageModel

HARVEST_TOKENS = 8192
"""Tokens per forward pass of the language model; fixed, so that a re-harvest is bit-identical."""


class ActivationStore:
    """Reads sequences, runs the language model up to the site, serves activations.

    Attributes:
        model: the language model, with its site.
        stream: token sequences of one split.
        seed: order of the sequences in each epoch, and of the activations in the buffer.
        before_pass: called before every pass of the language model; may raise to stop a harvest.
    """

    def __init__(
        self,
        model: LanguageModel,
        stream: SequenceStream,
        seed: int,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.stream, self.seed = model, stream, seed
        self.before_pass = before_pass

    def harvest(self, start: int, count: int) -> Tensor:
        """Activations of ``count`` sequences from index ``start``: ``[count·seq_len, d_model]``."""
        per_pass = max(1, HARVEST_TOKENS // self.stream.seq_len)
        parts = []
        for first in range(start, start + count, per_pass):
            taken = min(per_pass, start + count - first)
            parts.append(self.model.activations(self.sequences(first, taken)).flatten(0, 1))
        return torch.cat(parts)

    def sequences(self, start: int, count: int) -> Tensor:
        """Token sequences in training order, int64 ``[count, seq_len]``, on the model's device."""
        self.before_pass()
        return self.stream.sequences(start, count, seed=self.seed).to(self.model.device)

    def batches(self, batch_size: int, block_tokens: int, start_step: int = 0) -> Iterator[Tensor]:
        """Shuffled batches ``[batch_size, d_model]`` from ``start_step`` on (M18)."""
        per_block = block_tokens // self.stream.seq_len
        return mixed_batches(
            lambda index: self.harvest(index * per_block, per_block),
            batch_size=batch_size,
            block_tokens=block_tokens,
            seed=self.seed,
            start_step=start_step,
        )
