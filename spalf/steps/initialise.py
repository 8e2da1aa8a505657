"""The init step: from a calibration to an SAE that already reconstructs (M3, M5)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spalf.checkpoint import Checkpoint, fingerprint, write_checkpoint
from spalf.config import RunConfig, describe, schedule
from spalf.constraints import fisher_factor
from spalf.sae import StratifiedSAE, anchor_directions, initialise
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import StepContext, environment, exclusive
from spalf.steps.keep import keep_finished, take_finished
from spalf.training.schedules import first_l0
from spalf.training.state import sae_tensors

CELL_FIELDS = ("model_name", "hook_point", "F", "L0_target", "seed")
"""What identifies the cell an initialisation belongs to."""
METHOD_FIELDS = {"metric", "encoder_init", "anchors", "v_cap", "l0_schedule"}
"""What else of the configuration it depends on, besides ``c_eps`` and the calibration."""


def initialise_step(config: RunConfig, calibration: Path, out: Path, context: StepContext) -> None:
    """Build and initialise the SAE of one cell.

    Writes ``model.safetensors``, ``tensors.safetensors`` and ``metadata.json`` into ``out``.

    Raises:
        UserError: the calibration is damaged, or ``V_cap`` does not fit F.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        known = load_calibration(calibration, config, context.device)
    inputs = {"calibration": known.digests, **known.sources.inputs()}
    # Training is made anew where this changed, and only there: the SAE has other thresholds then.
    l0_start = first_l0(schedule(config), config.L0_target, known.whitener.d_model)
    identity = fingerprint({**init_settings(config), "l0_start": l0_start}, inputs)
    with exclusive(out, context):
        if take_finished(out, identity, context):
            return
        with context.nothing_to_lose():
            checkpoint = _initialised(config, known, l0_start)
        metadata = {
            **checkpoint.metadata,
            "inputs": inputs,
            "fingerprint": identity,
            "environment": environment(context),
        }
        out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(out, Checkpoint(checkpoint.tensors, metadata))
        keep_finished(out, identity, context)


def init_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that an initialised SAE depends on, those of its calibration apart."""
    include: dict[str, Any] = {**dict.fromkeys(CELL_FIELDS, True)}
    include |= {"method": METHOD_FIELDS, "constants": {"c_eps"}}
    return config.model_dump(mode="json", include=include)


def _initialised(config: RunConfig, known: Calibration, l0_start: float) -> Checkpoint:
    sae = StratifiedSAE(
        known.whitener,
        config.F,
        anchor_directions(known.token_directions, config.F, config.method),
        known.scale,
        config.method.surrogate,
        config.runtime.kernel,
        metric_factor=(
            fisher_factor(known.fisher, known.covariance)
            if config.method.metric == "fisher"
            else None
        ),
    )
    report = initialise(
        sae,
        known.sample,
        l0_start=l0_start,
        c_eps=config.constants.c_eps,
        encoder_init=config.method.encoder_init,
        seed=config.seed,
    )
    measured = {**known.measured, **asdict(report)}
    measured |= {"tau_start": report.first_mse / 2, "l0_start": l0_start}
    weights, constants = sae_tensors(sae)
    metadata = {
        "step": "init",
        "config": config.model_dump(mode="json", include=set(CELL_FIELDS)),
        "measured": measured,
        "derived": [asdict(row) for row in describe(config, measured)],
    }
    return Checkpoint({"model": weights, "tensors": constants}, metadata)
