"""All steps of one run in one process: what ``spalf-train`` and ``spalf-eval`` do."""

from __future__ import annotations

from pathlib import Path

from spalf.config import RunConfig
from spalf.steps.calibrate import calibrate
from spalf.steps.context import StepContext
from spalf.steps.evaluate import evaluate
from spalf.steps.initialise import initialise_step
from spalf.steps.train import phase1, phase2


def train_run(config: RunConfig, context: StepContext) -> Path:
    """Run every step into ``config.output_dir`` and return the path of ``evaluation.json``.

    A finished step is not repeated; to run one again, delete its directory.

    Raises:
        UserError: bad input, found by whichever step meets it first.
        Interrupted: asked to stop; the next call continues.
        Busy: another process is at work on the same directory.
    """
    base = Path(config.output_dir)
    calibration, init = base / "calibration", base / "init"
    first, second = base / "phase1", base / "phase2"
    if not (calibration / "metadata.json").exists():
        calibrate(config, calibration, context)
    if not (init / "metadata.json").exists():
        initialise_step(config, calibration, init, context)
    phase1(config, calibration, init, first, context)
    phase2(config, calibration, first, second, context)
    report = base / "evaluation.json"
    evaluate(config, calibration, {"phase1": first, "phase2": second}, report, context)
    return report


def evaluate_run(config: RunConfig, checkpoint: Path, context: StepContext) -> Path:
    """Evaluate one checkpoint directory; the report lands beside it.

    The held-out tokens are those of the run's calibration; where there is none yet in
    ``config.output_dir`` it is made first.

    Raises:
        UserError: the checkpoint is missing, damaged or of another dictionary size.
    """
    calibration = Path(config.output_dir) / "calibration"
    if not (calibration / "metadata.json").exists():
        calibrate(config, calibration, context)
    report = checkpoint.with_name(f"{checkpoint.name}.evaluation.json")
    evaluate(config, calibration, {checkpoint.name: checkpoint}, report, context)
    return report
