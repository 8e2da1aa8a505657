"""The training loop that serves both phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from spalf.config import RunConfig, Schedule, schedule
from spalf.controller import ema_value
from spalf.errors import Diverged, Interrupted
from spalf.training.phase import Phase
from spalf.training.state import TrainState
from spalf.training.step import record_row, train_step

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


def run_phase(state: TrainState, phase: Phase, config: RunConfig, hooks: Hooks) -> None:
    """Train until the phase ends, changing ``state`` in place.

    Args:
        state: at the start of the phase or, on a resume, anywhere within it.
        phase: see `spalf.training.phase`.
        config: the run.
        hooks: logging, checkpoints, interruption.

    Raises:
        Interrupted: ``hooks.should_stop`` said so; a checkpoint was written first.
        Diverged: a gradient was not finite at a logged step; nothing was written.
    """
    plan = schedule(config)
    batches = phase.batches(state.step - phase.first_step)
    while state.step < phase_end(state, phase, plan):
        record = train_step(state, next(batches), phase, config, plan)
        # A float, read on the host, only when it is logged anyway: no step waits for the device.
        if state.step % config.runtime.log_every_steps == 0:
            row = record_row(state, record, config, max(1, DEAD_TOKENS // config.batch_size))
            _require_finite(row, config)
            hooks.log(row)
        if phase.may_converge and state.step % CHECK_EVERY == 0:
            check_convergence(state, plan)
        if hooks.should_stop():
            hooks.checkpoint(state)
            raise Interrupted(state.step)
        if hooks.checkpoint_due(state.step):
            hooks.checkpoint(state)


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


def _require_finite(row: Mapping[str, float | int], config: RunConfig) -> None:
    for name in ("mse", "gradient_norm", "l0"):
        if not math.isfinite(row[name]):
            first = int(row["step"]) - config.runtime.log_every_steps + 1
            raise Diverged(
                f"{name} is {row[name]} at step {row['step']} (or up to {first - row['step']:d} "
                f"steps before): lower lr = {config.lr:g}, or use dtype float32"
            )
