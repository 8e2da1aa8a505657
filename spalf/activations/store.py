"""Activations of one site, harvested from a language model block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spalf.activations.buffer import buffer_position, mixed_batches
from spalf.activations.ring import BlockRing
from spalf.data import SequenceStream
from spalf.models import LanguageModel, replayed
from spalf.recording import launching

HARVEST_TOKENS = 8192
"""Tokens per forward pass of the language model; fixed, so that a re-harvest is bit-identical."""

ORDER = 0
"""Chooses the order of the sequences in each epoch. It is the same for every run, so that runs of
any seed can share one stream of activations; a run's seed chooses the order in the buffer."""


class ActivationStore:
    """Reads sequences, runs the language model up to the site, serves activations.

    Any number of runs may draw from one store. Where they keep step with one another, the
    language model works for all of them at once.

    Attributes:
        model: the language model, with its site.
        stream: token sequences of one split.
        before_pass: called before every pass of the language model; may raise to stop a harvest.
        ahead: whether blocks are harvested before they are asked for.
    """

    def __init__(
        self,
        model: LanguageModel,
        stream: SequenceStream,
        before_pass: Callable[[], None] = lambda: None,
        *,
        ahead: bool = False,
    ) -> None:
        self.model, self.stream = model, stream
        self.before_pass, self.ahead = before_pass, ahead
        self._activations = replayed(model, model.activations)
        self._logits = replayed(model, model.logits)
        self._ring: BlockRing | None = None
        self._latest: tuple[tuple[int, int], Tensor] | None = None
        self._clean: tuple[Tensor, Tensor] | None = None

    def harvest(self, start: int, count: int) -> Tensor:
        """Activations of ``count`` sequences from index ``start``: ``[count·seq_len, d_model]``."""
        return torch.cat(list(self._passes(start, count)))

    def _passes(self, start: int, count: int) -> Iterator[Tensor]:
        """What `harvest` returns, a pass of the language model at a time."""
        per_pass = max(1, HARVEST_TOKENS // self.stream.seq_len)
        for first in range(start, start + count, per_pass):
            taken = min(per_pass, start + count - first)
            tokens = self._read(first, taken)
            with launching():
                activations = self._activations(tokens)
            yield activations.flatten(0, 1)

    def _read(self, start: int, count: int) -> Tensor:
        self.before_pass()
        tokens = self.stream.sequences(start, count, seed=ORDER)
        if self.model.device.type == "cuda":
            # From pinned memory the host need not wait until the pass before this one is done.
            tokens = tokens.pin_memory()
        return tokens.to(self.model.device, non_blocking=True)

    def sequences(self, start: int, count: int) -> Tensor:
        """Token sequences in training order, int64 ``[count, seq_len]``, on the model's device."""
        if self._latest is None or self._latest[0] != (start, count):
            self._latest = (start, count), self._read(start, count)
        return self._latest[1]

    def clean_logits(self, tokens: Tensor) -> Tensor:
        """Logits of sequences from `sequences`; of the latest ones they are worked out once."""
        if self._clean is None or self._clean[0] is not tokens:
            self._clean = None  # not two of them at once: they are large
            self._clean = tokens, self._logits(tokens)
        return self._clean[1]

    def batches(
        self,
        batch_size: int,
        block_tokens: int,
        seed: int,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> Iterator[Tensor]:
        """Shuffled batches ``[batch_size, d_model]`` from ``start_step`` on (M18).

        Args:
            batch_size: activations per batch.
            block_tokens: half the buffer.
            seed: of the order in the buffer.
            start_step: index of the first batch.
            end_step: where nobody will ask for more; counts only where blocks are harvested ahead.
        """
        if self._ring is None or self._ring.block_tokens != block_tokens:
            last = None
            if end_step is not None:
                last, _ = buffer_position(max(0, end_step - 1), batch_size, block_tokens)
            self.close()
            self._ring = BlockRing(
                lambda index: self._block(index, block_tokens),
                block_tokens,
                self.model.device,
                ahead=self.ahead,
                last=last,
            )
        return mixed_batches(self._ring, batch_size=batch_size, seed=seed, start_step=start_step)

    def _block(self, index: int, block_tokens: int) -> Iterator[Tensor]:
        per_block = block_tokens // self.stream.seq_len
        return self._passes(index * per_block, per_block)

    def close(self) -> None:
        """Let go of the blocks, and stop harvesting ahead."""
        if self._ring is not None:
            self._ring.close()
        self._ring = None
