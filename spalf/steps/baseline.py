"""The baseline step: an SAE of SAELens on the activations that SPALF's Phase 1 sees."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
from spalf.checkpoint import (
    Checkpoint,
    CheckpointStore,
    fingerprint,
    read_metadata,
    write_checkpoint,
)
from spalf.config import RunConfig, schedule
from spalf.errors import Interrupted, StopRequested, UserError
from spalf.interchange.saelens import CONFIG_FILE, WEIGHTS_FILE
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import (
    CheckpointClock,
    Progress,
    StepContext,
    environment,
    exclusive,
)
from spalf.steps.keep import keep_finished, take_finished

logger = logging.getLogger(__name__)


def baseline_settings(config: RunConfig, method: str) -> dict[str, Any]:
    """The settings a trained baseline depends on."""
    site = ("model_name", "hook_point", "revision", "backend", "dtype", "trust_remote_code")
    run = ("dataset", "F", "L0_target", "seed", "total_tokens", "batch_size", "seq_len")
    include: dict[str, Any] = {**dict.fromkeys((*site, *run), True), "baselines": {"lrs": True}}
    return {**config.model_dump(mode="json", include=include), "baseline": method}


def baseline(
    config: RunConfig,
    method: str,
    calibration: Path,
    out: Path,
    context: StepContext,
    rate_of: Path | None = None,
) -> None:
    """Train a baseline at every learning rate of ``config.baselines`` and keep the best.

    Writes SAELens's ``cfg.json`` and ``sae_weights.safetensors``, and ``metadata.json`` with the
    hyper-parameters and what each rate reached, into ``out``; resumes from ``<out>.checkpoints``.

    Args:
        config: the run.
        method: ``batchtopk``, ``topk`` or ``jumprelu``.
        calibration: its calibration directory.
        out: directory to write.
        context: device, progress.
        rate_of: what this step wrote for another seed of the same cell; its rate is taken, and no
            other is tried.

    Raises:
        UserError: SAELens is missing, or an input is missing, damaged or of another run.
        Interrupted: asked to stop; a checkpoint was written.
        Diverged: training did, at every rate.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        require_saelens()
        known = load_calibration(calibration, config, context.device)
        chosen = _choice(rate_of, config, method) if rate_of else None
    if chosen:
        only = config.baselines.model_copy(update={"lrs": (chosen["lr"],)})
        config = config.model_copy(update={"baselines": only})
    inputs = {"calibration": known.digests, **known.sources.inputs()}
    identity = fingerprint(baseline_settings(config, method), inputs)
    with exclusive(out, context) as working:
        if take_finished(out, identity, context):
            return
        store = CheckpointStore(working, identity, context.if_foreign)
        result = _train(config, method, known, store, context)
        _warn_at_edge(result, method)
        best = result.best.folder
        metadata = {
            "step": "baseline",
            "method": method,
            "config": baseline_settings(config, method),
            "fingerprint": identity,
            "baseline": {**_record(result), **(chosen or {})},
            "environment": {**environment(context), "sae-lens": version("sae-lens")},
        }
        files = {name: best / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
        out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(out, Checkpoint({}, metadata, files))
        keep_finished(out, identity, context)


def _choice(rate_of: Path, config: RunConfig, method: str) -> dict[str, Any]:
    """What another seed's ``metadata.json`` says of the choice of the rate."""
    theirs = read_metadata(rate_of)
    ours, settings = baseline_settings(config, method), theirs.get("config", {})
    differing = [key for key in ours if key != "seed" and settings.get(key) != ours[key]]
    if differing:
        remedy = f"is of another cell: {differing[0]} is {settings.get(differing[0])!r} there"
        raise UserError("--rate-of", str(rate_of), f"{remedy}, {ours[differing[0]]!r} here")
    found = theirs["baseline"]
    chosen_by = f"{found['chosen_by']}, with seed {settings['seed']}"
    return {"lr": found["lr"], "rates": found["rates"], "chosen_by": chosen_by}


class _Keeper:
    """Follows a training: shows how far it is, writes checkpoints, says when to stop.

    Args:
        store: of the checkpoints.
        config: the run.
        context: of the step.
        progress: of the step.
        done: steps done when it begins.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: RunConfig,
        context: StepContext,
        progress: Progress,
        done: int,
    ) -> None:
        runtime = config.runtime
        self._store, self._context, self._progress = store, context, progress
        self._clock = CheckpointClock(
            runtime.checkpoint_every_minutes, runtime.checkpoint_every_steps
        )
        self._last = schedule(config).total_steps
        self._state: Callable[[], Checkpoint] | None = None
        self.step = done

    def after(self, step: int, state: Callable[[], Checkpoint]) -> None:
        """Take note of a step.

        Raises:
            StopRequested: the process was asked to stop.
        """
        self._progress.update(step - self.step)
        self.step, self._state = step, state
        if self._clock.due(step) or step == self._last:
            with self._clock.timed():
                self.save()
        self._context.pause_point()

    def save(self) -> None:
        """Write a checkpoint, unless that of this very step is there."""
        if self._state is not None and self._store.saved != self.step:
            self._store.save(self.step, self._state())


def _train(
    config: RunConfig,
    method: str,
    known: Calibration,
    store: CheckpointStore,
    context: StepContext,
) -> BaselineResult:
    with context.nothing_to_lose():
        saved = store.latest("cpu")
    model = context.load_model(known.sources.pinned(config))
    done = saved.metadata["trainers"][0]["counts"]["n_training_steps"] if saved else 0
    if saved:
        logger.info("resuming %s at step %d", method, done)
    progress = context.progress(method, schedule(config).total_steps, done)
    keeper = _Keeper(store, config, context, progress, done)
    train, held_out = (
        ActivationStore(model, split, context.pause_point)
        for split in (known.splits.train, known.splits.calibration)
    )
    try:
        return train_baseline(
            method,
            config,
            train,
            known.sample,
            selection_activations(held_out),
            store.directory / "rates",
            saved=saved,
            on_step=keeper.after,
            nothing_to_lose=context.nothing_to_lose,
        )
    except StopRequested:
        keeper.save()
        raise Interrupted(keeper.step) from None
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
