"""Training as files: the state of each SAE opened, trained in step with others, published."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spalf.activations import ActivationStore
from spalf.activations.store import HARVEST_TOKENS
from spalf.checkpoint import Checkpoint, CheckpointStore, write_checkpoint
from spalf.config import RunConfig, describe, schedule
from spalf.errors import Diverged, Interrupted, StopRequested, UserError
from spalf.steps.calibrate import Calibration
from spalf.steps.context import (
    COST_SHARE,
    CheckpointClock,
    StepContext,
    environment,
    exclusive,
    training_settings,
    working_directory,
)
from spalf.steps.keep import keep_finished, take_finished
from spalf.steps.trackers import open_trackers
from spalf.training.loop import Hooks, PhaseRun, phase_end, run_together
from spalf.training.metrics import MetricsLog
from spalf.training.phase import Phase
from spalf.training.position import tokens_seen
from spalf.training.state import TrainState, from_checkpoint, to_checkpoint
from spalf.training.trim import threshold_factor, trim_thresholds

logger = logging.getLogger(__name__)

LARGE_TRIM = 0.25
"""Change of the thresholds above which the trim is worth a warning."""
TRIM_TOKENS = 65_536
"""Training tokens on which the thresholds are trimmed at the end of a phase."""

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """One phase of one cell: configuration, places, and what it must agree with to resume.

    Attributes:
        config: the run.
        out: directory to write.
        context: of the step.
        calibration: of the run.
        identity: fingerprint of settings and inputs.
        start: makes the state at the start of the phase.
        phase_for: makes the phase for a state, which it may change on entry.
    """

    config: RunConfig
    out: Path
    context: StepContext
    calibration: Calibration
    identity: dict[str, Any]
    start: Callable[[], TrainState]
    phase_for: Callable[[TrainState, ActivationStore], Phase]

    @property
    def working(self) -> Path:
        """Where its checkpoints are."""
        return working_directory(self.out)


def train(jobs: Sequence[Job]) -> dict[Path, Diverged]:
    """Train the jobs that are not finished, in step with one another.

    Args:
        jobs: the same phase of cells of one site, with one context.

    Returns:
        What went wrong with those that diverged, by their output; the others are finished.

    Raises:
        UserError: an input is missing, damaged or of another run.
        Interrupted: asked to stop; checkpoints were written.
        Busy: another process is at work on one of the outputs.
    """
    with ExitStack() as stack:
        waiting = []
        for job in jobs:
            held = stack.enter_context(ExitStack())
            held.enter_context(exclusive(job.out, job.context))
            if take_finished(job.out, job.identity, job.context):
                keep_finished(job.out, job.identity, job.context)
                held.close()
            else:
                waiting.append(job)
        if waiting and waiting[0].context.finished_only:
            remedy = (
                "is not finished, although its pack has run; delete the pack.json of its model and "
                "run the workflow again"
            )
            raise UserError("--finished-only", str(waiting[0].out), remedy)
        return _train(waiting, stack) if waiting else {}


def _train(jobs: Sequence[Job], stack: ExitStack) -> dict[Path, Diverged]:
    config, context, known = jobs[0].config, jobs[0].context, jobs[0].calibration
    opened = [_Opened(job) for job in jobs]
    model = context.load_model(known.sources.pinned(config))
    activations = ActivationStore(
        model, known.splits.train, context.pause_point, ahead=config.runtime.overlap
    )
    stack.callback(activations.close)
    under_way = []
    for job in opened:
        under_way.append(_UnderWay(job, activations, COST_SHARE / len(jobs), len(jobs) > 1))
        stack.callback(under_way[-1].close)
    diverged = run_together([one.run for one in under_way])
    activations.close()
    sample = _Sample(activations)
    for index, one in enumerate(under_way):
        if index not in diverged:
            try:
                one.finish(sample)
            except StopRequested:
                for left in under_way[index:]:
                    left.run.save()
                raise Interrupted(one.run.state.step) from None
    return {jobs[index].out: error for index, error in diverged.items()}


class _Sample:
    """The first training tokens' activations, harvested once for everybody.

    Args:
        store: activations of the training split.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._batches: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        """Batches ``[tokens, d_model]``, `TRIM_TOKENS` in all."""
        seq_len = self._store.stream.seq_len
        per_pass = max(1, HARVEST_TOKENS // seq_len)
        for index in range(max(1, TRIM_TOKENS // (per_pass * seq_len))):
            if index == len(self._batches):
                self._batches.append(self._store.harvest(index * per_pass, per_pass))
            yield self._batches[index]


class _Opened:
    """A job with its state read: that of its latest checkpoint, or a new one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.store = CheckpointStore(job.working, job.identity, job.context.if_foreign)
        with job.context.nothing_to_lose():
            saved = self.store.latest("cpu")
            if saved:
                logger.info("resuming %s at step %d", job.out, saved.metadata["state"]["step"])
                shutil.copyfile(saved.files[METRICS], job.working / METRICS)
            device = job.context.device
            self.state = from_checkpoint(saved, job.config, device) if saved else job.start()


class _UnderWay:
    """A job that is being trained: its run, metrics log, trackers, progress and checkpoints.

    Args:
        opened: its state.
        activations: of the training split.
        share: of the time that its checkpoints may take.
        in_company: whether others are trained in the same process.

    Raises:
        Interrupted: asked to stop before the first step.
    """

    def __init__(
        self, opened: _Opened, activations: ActivationStore, share: float, in_company: bool
    ) -> None:
        job, state = opened.job, opened.state
        self._job, self._store = job, opened.store
        first_row = state.step
        try:
            phase = job.phase_for(state, activations)
        except StopRequested:  # at the entry to Phase 2, which is made anew
            raise Interrupted(first_row) from None
        runtime, context = job.config.runtime, job.context
        self._log = MetricsLog(job.working / METRICS, first_row)
        self._trackers = open_trackers(runtime.trackers, job.out, self._log.path, job.identity)
        self._clock = CheckpointClock(
            runtime.checkpoint_every_minutes, runtime.checkpoint_every_steps, share
        )
        hooks = Hooks(self._on_row, self._save, self._clock.due, context.should_stop)
        self.run = PhaseRun(state, phase, job.config, hooks, context.skip_nonfinite)
        end = phase_end(state, phase, schedule(job.config)) - phase.first_step
        what = f"phase {phase.number}"
        what += f", L0 {job.config.L0_target:g}, seed {job.config.seed}" if in_company else ""
        self._progress = context.progress(what, end, state.step - phase.first_step)
        self._shown = state.step

    def _on_row(self, row: Mapping[str, float | int]) -> None:
        self._log.append(row)
        self._trackers.log(row)
        shown = {"L0": row["l0"], "R2": row["explained_variance"]}
        shown |= {key.replace("lambda_", "λ_"): row[key] for key in row if key[:7] == "lambda_"}
        self._progress.update(int(row["step"]) - self._shown, shown)
        self._shown = int(row["step"])

    def _save(self, state: TrainState) -> None:
        """Write a checkpoint of ``state`` and the metrics log as it was, unless it is there."""
        if self._store.saved == state.step:
            return
        with self._clock.timed():
            self._log.sync()
            saved = to_checkpoint(state, {})
            _require_finite(saved, state.step)
            log = {METRICS: self._log.path}
            self._store.save(state.step, Checkpoint(saved.tensors, saved.metadata, log))

    def finish(self, sample: _Sample) -> None:
        """Trim the thresholds and write the result.

        Raises:
            StopRequested: while the activations to trim on were harvested.
        """
        if self.run.state.average is not None:
            self.run.state.average.put_into(self.run.state.sae)
        if self.run.state.step > self.run.phase.first_step:
            _trim(self._job, self.run.state, self.run.phase, sample)
        self.close()
        _publish(self._job, self.run.state)
        keep_finished(self._job.out, self._job.identity, self._job.context)

    def close(self) -> None:
        """Let go of log, trackers and progress; doing it twice does no harm."""
        if self._log.closed:
            return
        self._progress.close()
        self._log.close()
        self._trackers.close()


def _trim(job: Job, state: TrainState, phase: Phase, sample: _Sample) -> None:
    """Bring L0 to its target exactly, unless the run chose fewer features (M14)."""
    log_tau, floor = float(state.controller.log_tau), phase.gains.log_tau_floor
    if not job.config.method.setpoint or log_tau <= floor + phase.gains.tolerance:
        return
    factor = threshold_factor(state.sae, sample, job.config.L0_target)
    if abs(factor - 1) > LARGE_TRIM:
        logger.warning(
            "L0 was off its target at the end of phase %d: every threshold is scaled by %.2f; "
            "that costs fidelity, and a larger total_tokens or lr would let the controller do it",
            phase.number,
            factor,
        )
    trim_thresholds(state.sae, factor)
    state.derived[f"threshold_trim_phase{phase.number}"] = factor


def _publish(job: Job, state: TrainState) -> None:
    metadata = {
        "step": f"phase{2 if state.phase == 2 else 1}",
        "config": training_settings(job.config),
        "derived": [asdict(row) for row in describe(job.config, state.derived)],
        "fingerprint": job.identity,
        "stream": {
            "step": state.step,
            "tokens": tokens_seen(job.config, state.step, state.phase1_end),
        },
        "rng": {"kind": "counter-based", "seed": job.config.seed},
        "environment": environment(job.context),
    }
    job.out.mkdir(parents=True, exist_ok=True)
    state.average = None  # it is what the weights are now
    checkpoint = to_checkpoint(state, metadata)
    _require_finite(checkpoint, state.step)
    log = {METRICS: job.working / METRICS}
    write_checkpoint(job.out, Checkpoint(checkpoint.tensors, checkpoint.metadata, log))


def _require_finite(checkpoint: Checkpoint, step: int) -> None:
    """The last line of defence: a state that is not finite never reaches the disk."""
    for file in ("model", "optimizer"):
        for name, value in checkpoint.tensors[file].items():
            if not value.isfinite().all():
                remedy = "the checkpoint before it is kept; lower lr, or use dtype float32"
                raise Diverged(step, f"{name} of the {file}", "after the update", remedy)
