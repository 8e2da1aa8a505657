"""The baseline step: an SAE of SAELens on the activations that SPALF's Phase 1 sees."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spalf.activations import ActivationStore
from spalf.baselines import (
    BaselineResult,
    require_saelens,
    selection_activations,
    train_baseline,
)
from spalf.checkpoint import Checkpoint, fingerprint, read_checkpoint, write_checkpoint
from spalf.config import RunConfig, schedule
from spalf.errors import Interrupted, StopRequested, UserError
from spalf.interchange.saelens import CONFIG_FILE, WEIGHTS_FILE
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import StepContext, environment, exclusive, finished
from spalf.steps.keep import keep_finished, restore_finished

logger = logging.getLogger(__name__)

PROGRESS_STEPS = 10
"""Steps between updates of the progress display."""


def baseline_settings(config: RunConfig, method: str) -> dict[str, Any]:
    """The settings a trained baseline depends on."""
    site = ("model_name", "hook_point", "revision", "backend", "dtype", "trust_remote_code")
    run = ("dataset", "F", "L0_target", "seed", "total_tokens", "batch_size", "seq_len")
    chosen = config.model_dump(mode="json", include={*site, *run, "baselines"})
    return {**chosen, "baseline": method}


def baseline(
    config: RunConfig, method: str, calibration: Path, out: Path, context: StepContext
) -> None:
    """Train a baseline at every learning rate of ``config.baselines`` and keep the best.

    Writes SAELens's ``cfg.json`` and ``sae_weights.safetensors``, and ``metadata.json`` with the
    hyper-parameters and what each rate reached, into ``out``. SAELens cannot continue a run
    exactly where it stopped, so an interrupted one starts again.

    Args:
        config: the run.
        method: ``batchtopk``, ``topk`` or ``jumprelu``.
        calibration: its calibration directory.
        out: directory to write.
        context: device, progress.

    Raises:
        UserError: SAELens is missing, or an input is missing, damaged or of another run.
        Interrupted: asked to stop.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        require_saelens()
        known = load_calibration(calibration, config, context.device)
    inputs = {"calibration": known.digests, **known.sources.inputs()}
    identity = fingerprint(baseline_settings(config, method), inputs)
    with exclusive(out, context) as working:
        restore_finished(out, identity)
        if _finished(out, identity, context):
            return
        result = _train(config, method, known, working, context)
        _warn_at_edge(result, method)
        best = result.best.folder
        metadata = {
            "step": "baseline",
            "method": method,
            "config": baseline_settings(config, method),
            "fingerprint": identity,
            "baseline": _record(result),
            "environment": {**environment(context), "sae-lens": version("sae-lens")},
        }
        files = {name: best / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
        out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(out, Checkpoint({}, metadata, files))
        keep_finished(out, identity, context)


def _train(
    config: RunConfig, method: str, known: Calibration, working: Path, context: StepContext
) -> BaselineResult:
    model = context.load_model(known.sources.pinned(config))
    splits, total = known.splits, schedule(config).total_steps
    progress = context.progress(method, total, 0)
    done = 0

    def on_step(step: int) -> None:
        nonlocal done
        if step % PROGRESS_STEPS == 0 or step == total:
            context.pause_point()
            progress.update(step - done)
            done = step

    try:
        return train_baseline(
            method,
            config,
            ActivationStore(model, splits.train, context.pause_point),
            known.sample,
            selection_activations(ActivationStore(model, splits.calibration, context.pause_point)),
            working / "rates",
            on_step=on_step,
        )
    except StopRequested:
        logger.warning("SAELens cannot continue a run exactly: this baseline will start again")
        raise Interrupted(done) from None
    finally:
        progress.close()


def _warn_at_edge(result: BaselineResult, method: str) -> None:
    """Where the best rate is the smallest or the largest tried, a better one may lie beyond."""
    rates = sorted(tried.lr for tried in result.tried)
    if result.best.lr in (rates[0], rates[-1]) and len(rates) > 1:
        logger.warning(
            "%s: %g is the best of the learning rates %s, and the last on its side; "
            "baselines.lrs should go further",
            method,
            result.best.lr,
            ", ".join(f"{rate:g}" for rate in rates),
        )


def _finished(out: Path, identity: Mapping[str, Any], context: StepContext) -> bool:
    if not (out / "metadata.json").exists():
        return False
    try:
        metadata = read_checkpoint(out).metadata
    except UserError as error:
        logger.warning("training again: %s", error)
        return False
    return finished(out, metadata.get("fingerprint", {}), identity, context)


def _record(result: BaselineResult) -> dict[str, Any]:
    """What ``metadata.json`` says of the training."""
    return {
        "lr": result.best.lr,
        "hyperparameters": {**result.hyperparameters, **result.schedule},
        "norm_scale": result.norm_scale,
        "train_tokens": result.tokens,
        "rates": [{"lr": tried.lr, **asdict(tried.score)} for tried in result.tried],
        "chosen_by": "explained variance at the target L0, on the end of the calibration split",
    }
