"""Phase 1 and Phase 2 as steps: files in, files out, resumable in between (M15, M16, M18)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spalf.activations import ActivationStore
from spalf.checkpoint import fingerprint, read_checkpoint, read_metadata
from spalf.config import RunConfig, schedule
from spalf.controller import initial_state
from spalf.errors import Diverged, UserError
from spalf.sae import StratifiedSAE
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import StepContext, exclusive, training_settings, write_json
from spalf.steps.training import Job, train
from spalf.training.phase import Phase, enter_phase_two, metric_variance, phase_one, phase_two
from spalf.training.schedules import encoder_epsilon, peak_learning_rate, phase_two_rate
from spalf.training.state import TrainState, from_checkpoint, load_sae, make_optimizer

logger = logging.getLogger(__name__)

PROCEDURE = 6
"""Raised when the same settings train another SAE: what is there of an earlier one is made anew."""
LAMBDA_START = [4.0, 0.0, 0.0]
"""Multipliers at step 0, in the order of `spalf.constraints.CONSTRAINTS`."""


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
    known = _calibration(calibration, config, context)
    _alone(_phase1_job(config, known, init, out, context))


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
    known = _calibration(calibration, config, context)
    _alone(_phase2_job(config, known, previous, out, context))


def pack(
    cells: Mapping[Path, RunConfig], calibration: Path, out: Path, context: StepContext
) -> None:
    """Take several cells of one site through both phases on one stream of activations.

    Every cell ends as `phase1` and `phase2` would have left it, bit for bit, and resumes from its
    own checkpoints; but the language model works once for all of them. A cell that diverges does
    not stop the others: its own Phase 1 or 2, run alone, says what happened.

    Args:
        cells: directory of each cell, which holds ``init`` and gets ``phase1`` and ``phase2``, and
            its configuration; they differ in ``L0_target`` and ``seed`` only.
        calibration: their calibration.
        out: JSON file to write last: the cells, and the ones that diverged.
        context: of the step.

    Raises:
        UserError: an input is missing, damaged or of another run, or the cells do not belong
            together.
        Interrupted: asked to stop; checkpoints were written.
        Busy: another process is at work on one of the cells.
    """
    _require_one_stream(cells)
    with exclusive(out, context):
        failed = _pack(cells, calibration, context)
        write_json(out, {"cells": [str(cell) for cell in cells], "diverged": failed})


def _pack(
    cells: Mapping[Path, RunConfig], calibration: Path, context: StepContext
) -> dict[str, str]:
    known = _calibration(calibration, next(iter(cells.values())), context)
    failed: dict[str, str] = {}

    def note(diverged: Mapping[Path, Diverged]) -> None:
        failed.update({str(path.parent): str(error) for path, error in diverged.items()})

    first = [
        _phase1_job(config, known, cell / "init", cell / "phase1", context)
        for cell, config in cells.items()
    ]
    note(train(first))
    second = [
        _phase2_job(config, known, cell / "phase1", cell / "phase2", context)
        for cell, config in cells.items()
        if str(cell) not in failed
    ]
    note(train(second))
    return failed


def _alone(job: Job) -> None:
    for error in train([job]).values():
        raise error


def _calibration(path: Path, config: RunConfig, context: StepContext) -> Calibration:
    with context.nothing_to_lose():
        return load_calibration(path, config, context.device)


def _require_one_stream(cells: Mapping[Path, RunConfig]) -> None:
    if not cells:
        raise UserError("--cell", None, "give at least one cell")
    own = ("L0_target", "seed")
    shared = [
        {k: v for k, v in training_settings(config).items() if k not in own}
        for config in cells.values()
    ]
    for settings in shared[1:]:
        differing = [key for key in settings if settings[key] != shared[0][key]]
        if differing:
            raise UserError("--cell", None, f"cells of one pack cannot differ in {differing[0]}")


def _phase1_job(
    config: RunConfig, known: Calibration, init: Path, out: Path, context: StepContext
) -> Job:
    def start() -> TrainState:
        return _fresh_state(config, init, context.device)

    def phase_for(state: TrainState, store: ActivationStore) -> Phase:
        return phase_one(config, store, state.sae)

    identity = _identity(config, known, {"init": init})
    return Job(config, out, context, known, identity, start, phase_for)


def _phase2_job(
    config: RunConfig, known: Calibration, previous: Path, out: Path, context: StepContext
) -> Job:
    def start() -> TrainState:
        return from_checkpoint(read_checkpoint(previous), config, context.device)

    def phase_for(state: TrainState, store: ActivationStore) -> Phase:
        if state.phase == 1 and schedule(config).phase2_steps:
            enter_phase_two(state, config, store)
        return phase_two(config, store, state.sae, max(state.phase1_end, 0) or state.step)

    identity = _identity(config, known, {"phase1": previous})
    return Job(config, out, context, known, identity, start, phase_for)


def _identity(config: RunConfig, known: Calibration, inputs: Mapping[str, Path]) -> dict[str, Any]:
    digests: dict[str, Any] = {"calibration": known.digests, **known.sources.inputs()}
    for name, path in inputs.items():
        metadata = read_metadata(path)
        _require_same_run(path, metadata.get("config", {}), training_settings(config))
        digests[name] = metadata["digests"]
    return fingerprint({**training_settings(config), "procedure": PROCEDURE}, digests)


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
    peak = peak_learning_rate(config.lr, sae.d_model)
    if peak < config.lr:
        logger.warning(
            "lr = %g is held at %.3g: above that a step would turn columns too far for d = %d",
            config.lr,
            peak,
            sae.d_model,
        )
    return TrainState(
        sae=sae,
        optimizer=make_optimizer(sae, config),
        controller=initial_state(LAMBDA_START, log_tau, device),
        step=0,
        phase=1,
        phase1_end=-1,
        cooldown_start=plan.phase1_steps - plan.cooldown_steps,
        ended_by="budget",
        stale=torch.zeros(config.F, dtype=torch.int64, device=device),
        exchange_rate=torch.full((), torch.nan, dtype=torch.float64, device=device),
        derived={
            **measured,
            "tau_floor": _tau_floor(config, sae),
            "lr_peak": peak,
            "lr_phase2": phase_two_rate(config, sae.d_model),
            "encoder_epsilon": encoder_epsilon(config.batch_size, sae.d_sae, sae.d_model),
        },
    )


def _tau_floor(config: RunConfig, sae: StratifiedSAE) -> float:
    return (1 - config.R2_target) * metric_variance(sae, config.method.metric)
