"""The latest blocks of a stream of activations, held once for everybody who mixes them (M18)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Blocks = Callable[[int], Iterable[Tensor]]
"""``blocks(k)`` yields the k-th block of a stream in parts ``[tokens, d_model]``, in order."""


class BlockRing:
    """Two neighbouring blocks, and with ``ahead`` the one after them.

    With ``ahead`` a thread harvests the next block while the two before it are used; on a GPU, on
    a stream of its own. What is served is the same. The blocks of a stream are asked for in order;
    one that was passed already is harvested again.

    Attributes:
        block_tokens: activations in a block.
        device: where the blocks are.
    """

    def __init__(
        self,
        blocks: Blocks,
        block_tokens: int,
        device: torch.device,
        *,
        ahead: bool = False,
        last: int | None = None,
    ) -> None:
        """Hold nothing yet.

        Args:
            blocks: makes the blocks.
            block_tokens: activations in a block.
            device: where the blocks are made.
            ahead: whether to harvest the next block before it is asked for.
            last: the last block that anyone will ask for; none beyond it is harvested ahead.
        """
        self.block_tokens, self.device = block_tokens, device
        self._blocks, self._last = blocks, last
        self._slots = 3 if ahead else 2
        self._held: dict[int, int] = {}
        self._storage: Tensor | None = None
        self._cancelled = threading.Event()
        self._worker = ThreadPoolExecutor(1, "harvest") if ahead else None
        self._coming: tuple[int, Future[torch.cuda.Event | None]] | None = None

    def places(self, chunk: int, rows: Tensor) -> Tensor:
        """Where rows of block ``chunk``, or, where negative, of the one before it, are kept.

        Args:
            chunk: index of the newer of the two blocks.
            rows: int64 ``[tokens]``, from ``−block_tokens`` to ``block_tokens − 1``.

        Returns:
            int64 ``[tokens]``, what `take` asks for.
        """
        older, newer = self._place(chunk - 1) + self.block_tokens, self._place(chunk)
        return torch.where(rows < 0, rows + older, rows + newer)

    def take(self, chunk: int, places: Tensor) -> Tensor:
        """Activations of block ``chunk`` and of the one before it.

        Args:
            chunk: index of the newer of the two blocks.
            places: int64 ``[batch_size]``, from `places`.

        Returns:
            ``[batch_size, d_model]``, a copy.
        """
        if chunk:
            self._hold(chunk - 1)
        self._hold(chunk)
        self._look_ahead(chunk + 1)
        assert self._storage is not None
        return self._storage[places]

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._cancelled.is_set()

    def close(self) -> None:
        """Stop harvesting ahead, after the part that is being made."""
        self._cancelled.set()
        if self._worker:
            self._worker.shutdown(cancel_futures=True)

    def _place(self, index: int) -> int:
        """Where block ``index`` begins."""
        return index % self._slots * self.block_tokens

    def _hold(self, index: int) -> None:
        """Harvest block ``index`` where it is not there."""
        slot = index % self._slots
        if self._held.get(slot) != index and not self._arrived(index):
            self._held.pop(slot, None)
            self._fill(index)
            self._held[slot] = index

    def _arrived(self, index: int) -> bool:
        """Wait for the block that is being harvested, if any; whether it is this one."""
        if self._coming is None:
            return False
        (coming, harvest), self._coming = self._coming, None
        done = harvest.result()
        if done is not None:
            done.wait()
        self._held[coming % self._slots] = coming
        return coming == index

    def _look_ahead(self, index: int) -> None:
        """Begin with the block after the newest, whose place the oldest has left."""
        beyond = self._last is not None and index > self._last
        held = self._held.get(index % self._slots) == index
        if self._worker is None or beyond or held or self._coming is not None:
            return
        self._held.pop(index % self._slots, None)
        begin = None
        if self.device.type == "cuda":
            # What was asked of the oldest block so far has to be read before it is overwritten.
            begin = torch.cuda.Event()
            begin.record()
        self._coming = index, self._worker.submit(self._fill_aside, index, begin)

    def _fill_aside(self, index: int, begin: torch.cuda.Event | None) -> torch.cuda.Event | None:
        if begin is None:
            self._fill(index)
            return None
        aside = torch.cuda.Stream(self.device)
        with torch.cuda.stream(aside):
            begin.wait()
            self._fill(index)
            done = torch.cuda.Event()
            done.record()
        return done

    def _fill(self, index: int) -> None:
        """Copy a block into its place, part by part."""
        row = self._place(index)
        for part in self._blocks(index):
            if self._cancelled.is_set():
                return
            if self._storage is None:
                rows = self._slots * self.block_tokens
                self._storage = part.new_empty((rows, part.shape[1]))
            self._storage[row : row + len(part)] = part
            row += len(part)
