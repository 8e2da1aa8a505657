"""Phase 1 and Phase 2 as steps: files in, files out, resumable in between (M15, M16, M18)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spalf.activations import ActivationStore
from spalf.activations.store import HARVEST_TOKENS
from spalf.checkpoint import (
    Checkpoint,
    CheckpointStore,
    fingerprint,
    read_checkpoint,
    read_metadata,
    write_checkpoint,
)
from spalf.config import RunConfig, describe, schedule
from spalf.controller import initial_state
from spalf.errors import Diverged, Interrupted, StopRequested, UserError
from spalf.sae import StratifiedSAE
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import (
    CheckpointClock,
    StepContext,
    environment,
    exclusive,
    finished,
    training_settings,
    working_directory,
)
from spalf.steps.keep import keep_finished, restore_finished
from spalf.steps.trackers import Trackers, open_trackers
from spalf.training.loop import Hooks, phase_end, run_phase
from spalf.training.metrics import MetricsLog
from spalf.training.phase import (
    Phase,
    enter_phase_two,
    metric_variance,
    phase_one,
    phase_two,
)
from spalf.training.state import (
    TrainState,
    from_checkpoint,
    load_sae,
    make_optimizer,
    to_checkpoint,
)
from spalf.training.trim import threshold_factor, trim_thresholds

logger = logging.getLogger(__name__)

LARGE_TRIM = 0.25
"""Change of the thresholds above which the trim is worth a warning."""
TRIM_TOKENS = 65_536
"""Training tokens on which the thresholds are trimmed at the end of a phase."""

METRICS = "metrics.jsonl"

LAMBDA_START = [4.0, 0.0, 0.0]
"""Multipliers at step 0, in the order of `spalf.constraints.CONSTRAINTS`."""


@dataclass(frozen=True)
class _Job:
    """One phase of one cell: configuration, places, and what it must agree with to resume."""

    config: RunConfig
    out: Path
    context: StepContext
    calibration: Calibration
    identity: dict[str, Any]

    @property
    def working(self) -> Path:
        return working_directory(self.out)

    def save(self, store: CheckpointStore, state: TrainState) -> None:
        """Write a checkpoint of ``state``, with the metrics log as it was then."""
        saved = to_checkpoint(state, {})
        _require_finite(saved, state.step)
        log = {METRICS: self.working / METRICS}
        store.save(state.step, Checkpoint(saved.tensors, saved.metadata, log))


def phase1(
    config: RunConfig, calibration: Path, init: Path, out: Path, context: StepContext
) -> None:
    """Train on shuffled activations until the constraints hold or the budget ends (M15).

    Writes the five checkpoint files and ``metrics.jsonl`` into ``out``; resumes from
    ``<out>.checkpoints`` where that holds a checkpoint of the same run.

    Raises:
        UserError: an input is missing, damaged or of another run.
        Interrupted: asked to stop; a checkpoint was written.
        Diverged: something was not finite; the state before that step was written.
        Busy: another process is at work on ``out``.
    """

    def start() -> TrainState:
        return _fresh_state(config, init, context.device)

    def phase_for(state: TrainState, store: ActivationStore) -> Phase:
        return phase_one(config, store, state.sae)

    _run(_job(config, calibration, {"init": init}, out, context), start, phase_for)


def phase2(
    config: RunConfig, calibration: Path, previous: Path, out: Path, context: StepContext
) -> None:
    """Continue Phase 1's run end to end through the language model (M16).

    Writes the same files as `phase1`. With ``method.phase2_fraction: 0`` Phase 1's result is
    handed through unchanged.

    Raises:
        UserError: an input is missing, damaged or of another run.
        Interrupted: asked to stop; a checkpoint was written.
        Diverged: something was not finite; the state before that step was written.
        Busy: another process is at work on ``out``.
    """

    def start() -> TrainState:
        return from_checkpoint(read_checkpoint(previous), config, context.device)

    def phase_for(state: TrainState, store: ActivationStore) -> Phase:
        if state.phase == 1 and schedule(config).phase2_steps:
            enter_phase_two(state, config, store)
        return phase_two(config, store, state.sae, max(state.phase1_end, 0) or state.step)

    _run(_job(config, calibration, {"phase1": previous}, out, context), start, phase_for)


def _job(
    config: RunConfig,
    calibration: Path,
    inputs: Mapping[str, Path],
    out: Path,
    context: StepContext,
) -> _Job:
    with context.nothing_to_lose():
        known = load_calibration(calibration, config, context.device)
    digests: dict[str, Any] = {"calibration": known.digests, **known.sources.inputs()}
    for name, path in inputs.items():
        metadata = read_metadata(path)
        _require_same_run(path, metadata.get("config", {}), training_settings(config))
        digests[name] = metadata["digests"]
    return _Job(config, out, context, known, fingerprint(training_settings(config), digests))


def _require_same_run(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if differing:
        listed = ", ".join(f"{k} ({theirs.get(k)!r} there, {ours[k]!r} here)" for k in differing)
        raise UserError("config", None, f"{path} was made with another configuration: {listed}")


def _fresh_state(config: RunConfig, init: Path, device: torch.device) -> TrainState:
    checkpoint = read_checkpoint(init)
    sae = load_sae(checkpoint, config, device)
    plan = schedule(config)
    measured = checkpoint.metadata["measured"]
    log_tau = float(torch.tensor(measured["tau_start"], dtype=torch.float64).log())
    return TrainState(
        sae=sae,
        optimizer=make_optimizer(sae, config.lr),
        controller=initial_state(LAMBDA_START, log_tau, device),
        step=0,
        phase=1,
        phase1_end=-1,
        cooldown_start=plan.phase1_steps - plan.cooldown_steps,
        ended_by="budget",
        stale=torch.zeros(config.F, dtype=torch.int64, device=device),
        exchange_rate=torch.full((), torch.nan, dtype=torch.float64, device=device),
        derived={**measured, "tau_floor": _tau_floor(config, sae)},
    )


def _require_finite(checkpoint: Checkpoint, step: int) -> None:
    """The last line of defence: a state that is not finite never reaches the disk."""
    for file in ("model", "optimizer"):
        for name, value in checkpoint.tensors[file].items():
            if not value.isfinite().all():
                remedy = "the checkpoint before it is kept; lower lr, or use dtype float32"
                raise Diverged(step, f"{name} of the {file}", "after the update", remedy)


def _tau_floor(config: RunConfig, sae: StratifiedSAE) -> float:
    return (1 - config.R2_target) * metric_variance(sae, config.method.metric)


def _run(
    job: _Job,
    start: Callable[[], TrainState],
    phase_for: Callable[[TrainState, ActivationStore], Phase],
) -> None:
    with exclusive(job.out, job.context):
        if _finished(job):
            return
        store = CheckpointStore(job.working, job.identity, job.context.if_foreign)
        with job.context.nothing_to_lose():
            saved = store.latest("cpu")
            if saved:
                logger.info("resuming %s at step %d", job.out, saved.metadata["state"]["step"])
                shutil.copyfile(saved.files[METRICS], job.working / METRICS)
            state = from_checkpoint(saved, job.config, job.context.device) if saved else start()
        model = job.context.load_model(job.calibration.sources.pinned(job.config))
        activations = ActivationStore(
            model, job.calibration.splits.train, job.config.seed, job.context.pause_point
        )
        first_row = state.step
        try:
            phase = phase_for(state, activations)
        except StopRequested:  # at the entry to Phase 2, which is made anew
            raise Interrupted(first_row) from None
        log = MetricsLog(job.working / METRICS, first_row)
        trackers = open_trackers(job.config.runtime.trackers, job.out, log.path, job.identity)
        try:
            _train(job, state, phase, store, log, trackers)
            if state.step > phase.first_step:
                _trim(job, state, phase, activations)
        except StopRequested:
            log.sync()
            job.save(store, state)
            raise Interrupted(state.step) from None
        finally:
            log.close()
            trackers.close()
        _publish(job, state)
        keep_finished(job.out, job.identity, job.context)


def _finished(job: _Job) -> bool:
    """Whether this very step has been completed, by this or another process."""
    restore_finished(job.out, job.identity)
    if not (job.out / "metadata.json").exists():
        return False
    try:
        metadata = read_checkpoint(job.out).metadata
    except UserError as error:
        logger.warning("training again: %s", error)
        return False
    return finished(job.out, metadata.get("fingerprint", {}), job.identity, job.context)


def _train(
    job: _Job,
    state: TrainState,
    phase: Phase,
    store: CheckpointStore,
    log: MetricsLog,
    trackers: Trackers,
) -> None:
    runtime, plan = job.config.runtime, schedule(job.config)
    clock = CheckpointClock(runtime.checkpoint_every_minutes, runtime.checkpoint_every_steps)
    end = phase_end(state, phase, plan) - phase.first_step
    progress = job.context.progress(f"phase {phase.number}", end, state.step - phase.first_step)
    last = state.step

    def on_log(row: Mapping[str, float | int]) -> None:
        nonlocal last
        log.append(row)
        trackers.log(row)
        shown = {"L0": row["l0"], "R2": row["explained_variance"]}
        shown |= {key.replace("lambda_", "λ_"): row[key] for key in row if key[:7] == "lambda_"}
        progress.update(int(row["step"]) - last, shown)
        last = int(row["step"])

    def save(current: TrainState) -> None:
        with clock.timed():
            log.sync()
            job.save(store, current)

    hooks = Hooks(on_log, save, clock.due, job.context.should_stop)
    try:
        run_phase(state, phase, job.config, hooks, job.context.skip_nonfinite)
    finally:
        progress.close()


def _trim(job: _Job, state: TrainState, phase: Phase, store: ActivationStore) -> None:
    """Bring L0 to its target exactly, unless the run chose fewer features (M14)."""
    log_tau, floor = float(state.controller.log_tau), phase.gains.log_tau_floor
    if not job.config.method.setpoint or log_tau <= floor + phase.gains.tolerance:
        return
    per_pass = max(1, HARVEST_TOKENS // store.stream.seq_len)
    passes = max(1, TRIM_TOKENS // (per_pass * store.stream.seq_len))
    batches = (store.harvest(i * per_pass, per_pass) for i in range(passes))
    factor = threshold_factor(state.sae, batches, job.config.L0_target)
    if abs(factor - 1) > LARGE_TRIM:
        logger.warning(
            "L0 was off its target at the end of phase %d: every threshold is scaled by %.2f; "
            "that costs fidelity, and a larger total_tokens or lr would let the controller do it",
            phase.number,
            factor,
        )
    trim_thresholds(state.sae, factor)
    state.derived[f"threshold_trim_phase{phase.number}"] = factor


def _publish(job: _Job, state: TrainState) -> None:
    metadata = {
        "step": f"phase{2 if state.phase == 2 else 1}",
        "config": training_settings(job.config),
        "derived": [asdict(row) for row in describe(job.config, state.derived)],
        "fingerprint": job.identity,
        "stream": {"step": state.step, "batch_size": job.config.batch_size},
        "rng": {"kind": "counter-based", "seed": job.config.seed},
        "environment": environment(job.context),
    }
    job.out.mkdir(parents=True, exist_ok=True)
    checkpoint = to_checkpoint(state, metadata)
    _require_finite(checkpoint, state.step)
    log = {METRICS: job.working / METRICS}
    write_checkpoint(job.out, Checkpoint(checkpoint.tensors, checkpoint.metadata, log))
