"""The init step: from a calibration to an SAE that already reconstructs (M3, M5)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from spalf.checkpoint import Checkpoint, write_checkpoint
from spalf.config import RunConfig, describe, schedule
from spalf.sae import StratifiedSAE, anchor_directions, initialise
from spalf.steps.calibrate import load_calibration
from spalf.steps.context import StepContext, environment, exclusive, training_settings
from spalf.training.state import sae_tensors

INIT_FIELDS = ("model_name", "hook_point", "F", "L0_target", "seed")
"""What identifies the cell an initialisation belongs to; it does not depend on the rest."""


def initialise_step(config: RunConfig, calibration: Path, out: Path, context: StepContext) -> None:
    """Build and initialise the SAE of one cell.

    Writes ``model.safetensors``, ``tensors.safetensors`` and ``metadata.json`` into ``out``.

    Raises:
        UserError: the calibration is damaged, or ``V_cap`` does not fit F.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        known = load_calibration(calibration, config, context.device)
        sae = StratifiedSAE(
            known.whitener,
            config.F,
            anchor_directions(known.token_directions, config.F, config.method),
            known.scale,
            config.method.surrogate,
            config.runtime.kernel,
        )
        report = initialise(
            sae,
            known.sample,
            l0_start=schedule(config).l0_start,
            c_eps=config.constants.c_eps,
            encoder_init=config.method.encoder_init,
            seed=config.seed,
        )
    measured = {**known.measured, **asdict(report)}
    measured["tau_start"] = report.first_mse / 2
    weights, constants = sae_tensors(sae)
    metadata = {
        "step": "init",
        "config": {name: training_settings(config)[name] for name in INIT_FIELDS},
        "measured": measured,
        "derived": [asdict(row) for row in describe(config, measured)],
        "inputs": {"calibration": known.digests, **known.sources.inputs()},
        "environment": environment(context),
    }
    with exclusive(out, context):
        out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(out, Checkpoint({"model": weights, "tensors": constants}, metadata))
