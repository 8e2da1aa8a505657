"""Where in the training stream the batch of a step lies, for people who want to look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from spalf.activations import buffer_position
from spalf.config import RunConfig, schedule

if TYPE_CHECKING:
    from spalf.training.state import TrainState


def first_sequence_of_phase_two(config: RunConfig, phase1_end: int) -> int:
    """Index of the first training sequence after Phase 1's last block (M16, M18)."""
    plan = schedule(config)
    chunk, _ = buffer_position(max(0, phase1_end - 1), config.batch_size, plan.block_tokens)
    return (chunk + 1) * (plan.block_tokens // config.seq_len)


def tokens_seen(config: RunConfig, step: int, phase1_end: int) -> int:
    """Training tokens behind a run.

    Args:
        config: the run.
        step: optimiser steps done.
        phase1_end: step at which Phase 1 ended; negative where it has not.
    """
    if phase1_end < 0:
        return step * config.batch_size
    per_step = schedule(config).phase2_sequences * config.seq_len
    return phase1_end * config.batch_size + (step - phase1_end) * per_step


def tokens_silent(state: TrainState, config: RunConfig) -> Tensor:
    """Training tokens since each feature last fired, int64 ``[d_sae]``.

    Args:
        state: between two steps.
        config: the run.
    """
    if state.phase == 1:
        return state.stale * config.batch_size
    in_phase_two = state.stale.clamp_max(state.step - state.phase1_end)
    per_step = schedule(config).phase2_sequences * config.seq_len
    return in_phase_two * per_step + (state.stale - in_phase_two) * config.batch_size


def stream_position(config: RunConfig, phase1_end: int | None, step: int) -> dict[str, int]:
    """Training sequences that the batch of ``step`` (counted from 0) is drawn from.

    Args:
        config: the run.
        phase1_end: step at which Phase 1 ended, for a step of Phase 2; else ``None``.
        step: optimiser steps done before it.

    Returns:
        ``first_sequence`` and ``last_sequence`` in training order and, in Phase 1, ``chunk`` and
        ``offset`` in the mixing buffer.
    """
    if phase1_end is not None:
        per_batch = schedule(config).phase2_sequences
        first = first_sequence_of_phase_two(config, phase1_end) + (step - phase1_end) * per_batch
        return {"first_sequence": first, "last_sequence": first + per_batch - 1}
    block = schedule(config).block_tokens
    chunk, offset = buffer_position(step, config.batch_size, block)
    per_block = block // config.seq_len
    # A chunk mixes its own block with the one before it.
    first, last = max(0, chunk - 1) * per_block, (chunk + 1) * per_block - 1
    return {"first_sequence": first, "last_sequence": last, "chunk": chunk, "offset": offset}


def described(position: dict[str, int]) -> str:
    """A position in words."""
    first, last = position["first_sequence"], position["last_sequence"]
    text = f"training sequences {first} to {last}"
    if "chunk" in position:
        text += f", buffer chunk {position['chunk']}, offset {position['offset']}"
    return text
