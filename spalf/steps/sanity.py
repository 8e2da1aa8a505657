"""The random step: an SAE that nobody trained, which every trained one has to beat."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from spalf.checkpoint import Checkpoint, fingerprint, write_checkpoint
from spalf.config import RANDOM, RunConfig
from spalf.interchange.fold import fold
from spalf.interchange.saelens import CONFIG_FILE, WEIGHTS_FILE
from spalf.interchange.writers import write_saelens
from spalf.sae import StratifiedSAE, initialise
from spalf.steps.calibrate import load_calibration
from spalf.steps.context import StepContext, environment, exclusive
from spalf.steps.keep import take_finished

_FIELDS = ("model_name", "hook_point", "dataset", "seq_len", "F", "L0_target", "seed")


def random_step(config: RunConfig, calibration: Path, out: Path, context: StepContext) -> None:
    """Write an SAE with random directions and the L0 that is asked for.

    It has what data alone gives, and no training: random decoder directions, orthogonal to each
    other as long as dimensions remain; the encoder row that detects each best (M5); every
    threshold at the quantile of its pre-activation at which the feature fires on ``L0_target/F``
    of the calibration sample; and one scale by least squares. It is written like a baseline, in
    SAELens's format, so that it is evaluated like one.

    Args:
        config: the run; its ``F``, ``L0_target`` and ``seed`` count.
        calibration: its calibration directory.
        out: directory to write.
        context: device.

    Raises:
        UserError: the calibration is missing, damaged or of another run.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        known = load_calibration(calibration, config, context.device)
    settings = config.model_dump(mode="json", include=set(_FIELDS))
    inputs = {"calibration": known.digests, **known.sources.inputs()}
    identity = fingerprint({**settings, "baseline": RANDOM}, inputs)
    with exclusive(out, context) as working:
        if take_finished(out, identity, context):
            return
        sae = StratifiedSAE(
            known.whitener, config.F, torch.zeros(0, known.whitener.mean.shape[0]), known.scale
        )
        initialise(
            sae,
            known.sample,
            l0_start=config.L0_target,
            c_eps=config.constants.c_eps,
            encoder_init="matched_filter",
            seed=config.seed,
        )
        metadata = {
            "step": RANDOM,
            "method": RANDOM,
            "config": settings,
            "fingerprint": identity,
            # What the evaluation asks of any SAE in SAELens's format.
            "baseline": {
                "lr": None,
                "hyperparameters": {"decoder": "random", "encoder": "matched filter"},
                "rates": [],
                "train_tokens": 0,
            },
            "environment": environment(context),
        }
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=working) as folder:
            made = Path(folder)
            write_saelens(fold(sae, apply_b_dec_to_input=True), settings, made)
            files = {name: made / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
            write_checkpoint(out, Checkpoint({}, metadata, files))
