"""The training loop that serves both phases, for one SAE or several on one stream."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from spalf.config import RunConfig, Schedule, schedule
from spalf.controller import ema_value
from spalf.errors import Diverged, Interrupted, StopRequested
from spalf.training.average import WeightAverage
from spalf.training.graph import stepper
from spalf.training.phase import Phase
from spalf.training.position import described, stream_position
from spalf.training.state import TrainState
from spalf.training.step import LogRow, first_non_finite

logger = logging.getLogger(__name__)

CHECK_EVERY = 50
SATISFIED_STEPS = 100
STILL = 0.005
"""Relative change over a tenth of Phase 1 below which the frontier has stopped moving (M15)."""


@dataclass(frozen=True)
class Hooks:
    """What the loop does besides training.

    Attributes:
        log: receives one row of metrics every ``log_every_steps`` steps, and one at the last; in
            order, before any later checkpoint, and where nothing is in a hurry a step late.
        checkpoint: saves the state.
        checkpoint_due: asked after every step, with the step.
        should_stop: asked after every step.
    """

    log: Callable[[Mapping[str, float | int]], None]
    checkpoint: Callable[[TrainState], None]
    checkpoint_due: Callable[[int], bool]
    should_stop: Callable[[], bool]


class PhaseRun:
    """One SAE's way through a phase, a batch at a time.

    Attributes:
        state: at the start of the phase or, on a resume, anywhere within it; changed in place.
        phase: see `spalf.training.phase`.
        config: the run.
        hooks: logging, checkpoints, interruption.
        skip_nonfinite: batches of the phase that may be passed over because the loss or a
            gradient is not finite; they are recorded in ``state.skipped``.
    """

    def __init__(
        self,
        state: TrainState,
        phase: Phase,
        config: RunConfig,
        hooks: Hooks,
        skip_nonfinite: int = 0,
    ) -> None:
        self.state, self.phase, self.config, self.hooks = state, phase, config, hooks
        self.skip_nonfinite = skip_nonfinite
        self._plan = schedule(config)
        self._step = stepper(state, phase, config)
        self._batches: Iterator[Tensor] | None = None
        self._row: LogRow | None = None

    @property
    def done(self) -> bool:
        """Whether the phase has ended."""
        return self.state.step >= phase_end(self.state, self.phase, self._plan)

    def advance(self) -> None:
        """Take one step, or go back to before one that came to nothing.

        Raises:
            Interrupted: asked to stop, by ``hooks`` or while batches were harvested; a checkpoint
                was written first.
            Diverged: something was not finite; a checkpoint of the state before that step was
                written.
        """
        try:
            self._advance()
        except StopRequested:
            self.save()
            raise Interrupted(self.state.step) from None

    def _advance(self) -> None:
        state, hooks = self.state, self.hooks
        if self._batches is None:
            self._batches = self._batches_from_here()
        record = self._step(next(self._batches))
        self._take_average()
        stop, due = hooks.should_stop(), hooks.checkpoint_due(state.step)
        # The last step is logged as well, or a short phase would leave no row at all.
        logged = state.step % self.config.runtime.log_every_steps == 0 or self.done
        checked = state.step % CHECK_EVERY == 0
        # A row is read once the device has the next step to go on with. Other than for that, it is
        # waited for only where something has to be decided or saved.
        wait = stop or due or checked or self.done
        if (not self._log_latest() or wait) and state.guard.rewind(state):
            self._batches = None
            if state.guard.overflowed:
                state.sae.list_margin *= 2
            else:
                self._pass_over()
            return
        if logged:
            self._row = LogRow(state, record, self.config)
        if wait:
            self._log_latest()
        if checked and self.phase.may_converge:
            check_convergence(state, self._plan)
        if stop or due:
            hooks.checkpoint(state)
        if stop:
            raise Interrupted(state.step)

    def _take_average(self) -> None:
        state, start = self.state, self.phase.average_from
        if start is None or state.step <= start:
            return
        if state.average is None:
            state.average = WeightAverage.of_nothing(state.sae)
        state.average.add(state.sae, unless=state.guard.found)

    def _log_latest(self) -> bool:
        """Log the row that was asked for last; whether that found nothing amiss."""
        if self._row is None:
            return True
        row, self._row = self._row.read(), None
        if row is not None:
            self.hooks.log(row)
        return row is not None

    def save(self) -> None:
        """Write a checkpoint, between two steps."""
        self._log_latest()
        self.state.guard.rewind(self.state)
        self.hooks.checkpoint(self.state)

    def _batches_from_here(self) -> Iterator[Tensor]:
        return self.phase.batches(self.state.step - self.phase.first_step)

    def _pass_over(self) -> None:
        """Find out what was not finite in the coming batch, and go past it if that is allowed."""
        state, config, phase = self.state, self.config, self.phase
        batch = next(self._batches_from_here())
        tensor = first_non_finite(state, batch, phase, config, self._plan)
        phase1_end = phase.first_step if phase.number == 2 else None
        position = stream_position(config, phase1_end, state.step)
        step = state.step + 1
        passed_over = sum(found["step"] > phase.first_step for found in state.skipped)
        if passed_over >= self.skip_nonfinite:
            self.hooks.checkpoint(state)
            remedy = (
                f"the state before it is kept; lower lr = {config.lr:g}, use dtype float32, or go "
                "past such batches with --skip-nonfinite N"
            )
            raise Diverged(step, tensor, described(position), remedy)
        logger.warning(
            "%s not finite at step %d (%s): batch skipped", tensor, step, described(position)
        )
        state.skipped.append({"step": step, "tensor": tensor, "stream": position})
        state.step = step


def run_phase(
    state: TrainState, phase: Phase, config: RunConfig, hooks: Hooks, skip_nonfinite: int = 0
) -> None:
    """Train until the phase ends, changing ``state`` in place; see `PhaseRun`."""
    run = PhaseRun(state, phase, config, hooks, skip_nonfinite)
    while not run.done:
        run.advance()


def run_together(runs: Sequence[PhaseRun]) -> dict[int, Diverged]:
    """Train several SAEs to the end of their phase, in step with one another.

    Each is trained exactly as it would be alone. As they ask for the same part of the stream at
    the same time, it is harvested once. Those that are behind, because they resumed from an
    earlier checkpoint or had to go back, go first until they have caught up.

    Args:
        runs: of one stream of activations.

    Returns:
        What went wrong with those that diverged, by their place in ``runs``; the others went on.

    Raises:
        Interrupted: asked to stop; checkpoints of all of them were written first.
    """
    diverged: dict[int, Diverged] = {}
    while pending := {i: r for i, r in enumerate(runs) if i not in diverged and not r.done}:
        behind = min(run.state.step for run in pending.values())
        for index, run in pending.items():
            if run.state.step > behind:
                continue
            try:
                run.advance()
            except Diverged as error:
                diverged[index] = error
            except Interrupted:
                for place, other in enumerate(runs):
                    if other is not run and place not in diverged:
                        with suppress(Diverged):  # its last good checkpoint is kept
                            other.save()
                raise
    return diverged


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
