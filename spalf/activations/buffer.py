"""The two-block mixing buffer, as a pure function from blocks to batches (M18, I9).

A stream of blocks b_0, b_1, … is cut into random halves. Chunk 0 is the first half of b_0; chunk k
is the second half of b_{k−1} together with the first half of b_k, shuffled. So every activation is
served exactly once, mixed with its neighbours on one side, and only two blocks are ever held. The
state at a step is a function of (seed, step): resuming re-harvests two blocks and stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


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
    block: Callable[[int], Tensor],
    *,
    batch_size: int,
    block_tokens: int,
    seed: int,
    start_step: int = 0,
) -> Iterator[Tensor]:
    """Endless batches ``[batch_size, d_model]`` from ``start_step`` on.

    Args:
        block: ``block(k)`` returns the k-th block of the stream, ``[block_tokens, d_model]``.
        batch_size: activations per batch; ``2·batch_size`` must divide ``block_tokens``, so that
            no batch straddles two chunks.
        block_tokens: activations per block, half the buffer.
        seed: chooses the halves and the order within a chunk.
        start_step: index of the first batch yielded.

    Raises:
        ValueError: the sizes do not divide.
    """
    if block_tokens % (2 * batch_size):
        raise ValueError(f"block_tokens {block_tokens} is no multiple of 2·batch_size {batch_size}")
    chunk, offset = buffer_position(start_step, batch_size, block_tokens)
    carried = _half(block(chunk - 1), seed, chunk - 1, second=True) if chunk else None
    while True:
        current = block(chunk)
        first = _half(current, seed, chunk, second=False)
        pool = first if carried is None else torch.cat([carried, first])
        order = _permutation(len(pool), seed, chunk, purpose=1).to(pool.device)
        for start in range(offset, len(pool), batch_size):
            yield pool[order[start : start + batch_size]]
        carried = _half(current, seed, chunk, second=True)
        chunk, offset = chunk + 1, 0


def _half(block: Tensor, seed: int, index: int, *, second: bool) -> Tensor:
    order = _permutation(len(block), seed, index, purpose=0).to(block.device)
    middle = len(block) // 2
    return block[order[middle:] if second else order[:middle]]


def _permutation(length: int, seed: int, index: int, *, purpose: int) -> Tensor:
    """A permutation that depends on its arguments only, not on what was drawn before."""
    # Any injective map of (seed, index, purpose) into 63 bits will do.
    generator = torch.Generator().manual_seed((seed * 2_000_003 + index) * 2 + purpose)
    return torch.randperm(length, generator=generator)
