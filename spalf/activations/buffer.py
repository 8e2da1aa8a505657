"""The two-block mixing buffer, as a pure function from blocks to batches (M18, I9).

A stream of blocks b_0, b_1, … is cut into random halves. Chunk 0 is the first half of b_0; chunk k
is the second half of b_{k−1} together with the first half of b_k, shuffled. So every activation is
served exactly once, mixed with its neighbours on one side, and only two blocks are ever needed. The
state at a step is a function of (seed, step): resuming re-harvests two blocks and stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from spalf.activations.ring import BlockRing


def buffer_position(step: int, batch_size: int, block_tokens: int) -> tuple[int, int]:
    """Chunk, and offset in it, at which the batch of ``step`` starts.

    Chunk 0 holds ``block_tokens / 2`` activations, every later one ``block_tokens``.
    """
    position = step * batch_size
    half = block_tokens // 2
    if position < half:
        return 0, position
    chunk, offset = divmod(position - half, block_tokens)
    return chunk + 1, offset


def mixed_batches(
    ring: BlockRing, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[Tensor]:
    """Endless batches ``[batch_size, d_model]`` from ``start_step`` on.

    Several of these may draw on one ring, each with its own seed. As long as they keep step with
    one another every block is harvested once. A thread works out the order of the next chunk while
    this one is served.

    Args:
        ring: the blocks; ``2·batch_size`` must divide their length, so that no batch straddles two
            chunks.
        batch_size: activations per batch.
        seed: chooses the halves and the order within a chunk.
        start_step: index of the first batch yielded.

    Raises:
        ValueError: the sizes do not divide.
    """
    length = ring.block_tokens
    if length % (2 * batch_size):
        raise ValueError(f"block_tokens {length} is no multiple of 2·batch_size {batch_size}")
    chunk, offset = buffer_position(start_step, batch_size, length)
    pinned = ring.device.type == "cuda"

    def order(chunk: int) -> Tensor:
        rows = _rows_of_chunk(length, seed, chunk)
        # From any other memory the copy would wait for everything the GPU was asked before.
        return rows.pin_memory() if pinned else rows

    with ThreadPoolExecutor(1, "shuffle") as worker:
        coming = worker.submit(order, chunk)
        while True:
            here = coming.result()
            coming = worker.submit(order, chunk + 1)
            places = ring.places(chunk, here.to(ring.device, non_blocking=True))
            for start in range(offset, len(places), batch_size):
                yield ring.take(chunk, places[start : start + batch_size])
            chunk, offset = chunk + 1, 0


def _rows_of_chunk(length: int, seed: int, chunk: int) -> Tensor:
    """The rows of a chunk in the order they are served; those of its older block are negative."""
    newer = _half(length, seed, chunk, second=False)
    if chunk == 0:
        return newer[_permutation(len(newer), seed, chunk, purpose=1)]
    pool = torch.cat([_half(length, seed, chunk - 1, second=True) - length, newer])
    return pool[_permutation(len(pool), seed, chunk, purpose=1)]


def _half(length: int, seed: int, index: int, *, second: bool) -> Tensor:
    order = _permutation(length, seed, index, purpose=0)
    return order[length // 2 :] if second else order[: length // 2]


def _permutation(length: int, seed: int, index: int, *, purpose: int) -> Tensor:
    """A permutation that depends on its arguments only, not on what was drawn before."""
    # Any injective map of (seed, index, purpose) into 63 bits will do.
    generator = torch.Generator().manual_seed((seed * 2_000_003 + index) * 2 + purpose)
    return torch.randperm(length, generator=generator)
