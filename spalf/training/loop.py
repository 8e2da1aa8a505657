"""The training loop that serves both phases."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spalf.config import RunConfig, Schedule, schedule
from spalf.controller import ema_value
from spalf.errors import Diverged, Interrupted
from spalf.training.graph import stepper
from spalf.training.phase import Phase
from spalf.training.position import described, stream_position
from spalf.training.state import TrainState
from spalf.training.step import first_non_finite, record_row

logger = logging.getLogger(__name__)

CHECK_EVERY = 50
SATISFIED_STEPS = 100
STILL = 0.005
"""Relative change over a tenth of Phase 1 below which the frontier has stopped moving (M15)."""
DEAD_TOKENS = 1_000_000


@dataclass(frozen=True)
class Hooks:
    """What the loop does besides training.

    Attributes:
        log: receives one row of metrics every ``log_every_steps`` steps.
        checkpoint: saves the state.
        checkpoint_due: asked after every step, with the step.
        should_stop: asked after every step.
    """

    log: Callable[[Mapping[str, float | int]], None]
    checkpoint: Callable[[TrainState], None]
    checkpoint_due: Callable[[int], bool]
    should_stop: Callable[[], bool]


def run_phase(
    state: TrainState, phase: Phase, config: RunConfig, hooks: Hooks, skip_nonfinite: int = 0
) -> None:
    """Train until the phase ends, changing ``state`` in place.

    Args:
        state: at the start of the phase or, on a resume, anywhere within it.
        phase: see `spalf.training.phase`.
        config: the run.
        hooks: logging, checkpoints, interruption.
        skip_nonfinite: batches of the phase that may be passed over because the loss or a
            gradient is not finite; they are recorded in ``state.skipped``.

    Raises:
        Interrupted: ``hooks.should_stop`` said so; a checkpoint was written first.
        Diverged: something was not finite; a checkpoint of the state before that step was written.
        StopRequested: from the stream of batches; ``state`` is between two steps.
    """
    plan = schedule(config)
    batches, step = phase.batches(state.step - phase.first_step), stepper(state, phase, config)
    while state.step < phase_end(state, phase, plan):
        batch = next(batches)
        record = step(batch)
        stop, due = hooks.should_stop(), hooks.checkpoint_due(state.step)
        logged = state.step % config.runtime.log_every_steps == 0
        checked = state.step % CHECK_EVERY == 0
        last = state.step == phase_end(state, phase, plan)
        # The device is read only where it is read anyway: no other step waits for it.
        if (stop or due or logged or checked or last) and state.guard.rewind(state):
            if state.guard.overflowed:
                state.sae.list_margin *= 2
                batches = phase.batches(state.step - phase.first_step)
            else:
                batches = pass_over(state, phase, config, hooks, skip_nonfinite)
            continue
        if logged:
            hooks.log(record_row(state, record, config, max(1, DEAD_TOKENS // config.batch_size)))
        if checked and phase.may_converge:
            check_convergence(state, plan)
        if stop or due:
            hooks.checkpoint(state)
        if stop:
            raise Interrupted(state.step)


def pass_over(
    state: TrainState, phase: Phase, config: RunConfig, hooks: Hooks, allowed: int
) -> Iterator[Tensor]:
    """Find out what was not finite in the coming batch, and go past it if that is allowed.

    Args:
        state: before the batch's step.
        phase: as for `run_phase`; likewise ``config`` and ``hooks``.
        config: the run.
        hooks: logging, checkpoints, interruption.
        allowed: batches of this phase that may be passed over.

    Returns:
        The batches that follow.

    Raises:
        Diverged: as many batches were passed over before; a checkpoint was written.
    """
    batches = phase.batches(state.step - phase.first_step)
    tensor = first_non_finite(state, next(batches), phase, config, schedule(config))
    phase1_end = phase.first_step if phase.number == 2 else None
    position = stream_position(config, phase1_end, state.step)
    step = state.step + 1
    if sum(found["step"] > phase.first_step for found in state.skipped) >= allowed:
        hooks.checkpoint(state)
        remedy = (
            f"the state before it is kept; lower lr = {config.lr:g}, use dtype float32, or go past "
            "such batches with --skip-nonfinite N"
        )
        raise Diverged(step, tensor, described(position), remedy)
    logger.warning(
        "%s not finite at step %d (%s): batch skipped", tensor, step, described(position)
    )
    state.skipped.append({"step": step, "tensor": tensor, "stream": position})
    state.step = step
    return batches


def phase_end(state: TrainState, phase: Phase, plan: Schedule) -> int:
    """Step at which the phase ends, as things stand (M15)."""
    if not phase.may_converge:
        return phase.last_step
    return min(phase.last_step, state.cooldown_start + plan.cooldown_steps)


def check_convergence(state: TrainState, plan: Schedule) -> None:
    """Start the cooldown early once constraints hold and the frontier stands still (M15).

    The frontier is the pair (log τ, log L0): with the setpoint loop holding L0, τ is the error
    that this L0 buys; where R2_target is reached first, τ rests on its floor and L0 moves.
    """
    control = state.controller
    reading = torch.stack(
        [control.log_tau, ema_value(control.l0_ratio), control.satisfied]
    ).tolist()
    log_tau, l0_ratio, satisfied = reading
    state.history.append((state.step, log_tau, math.log(max(l0_ratio, 1e-6))))
    if state.step >= state.cooldown_start or state.step < plan.l0_ramp_steps:
        return
    if satisfied >= SATISFIED_STEPS and _stands_still(state, plan):
        state.cooldown_start, state.ended_by = state.step, "converged"


def _stands_still(state: TrainState, plan: Schedule) -> bool:
    window = max(SATISFIED_STEPS, plan.phase1_steps // 10)
    earlier = [row for row in state.history if row[0] <= state.step - window]
    if not earlier or earlier[-1][0] < plan.l0_ramp_steps:
        return False
    then, now = earlier[-1], state.history[-1]
    return all(abs(now[i] - then[i]) < STILL for i in (1, 2))
