"""The steps of the workflow as functions: files in, files out."""

from spalf.steps.baseline import baseline
from spalf.steps.calibrate import calibrate
from spalf.steps.consistency import consistency
from spalf.steps.context import Progress, StepContext
from spalf.steps.dashboard import dashboard
from spalf.steps.evaluate import evaluate
from spalf.steps.initialise import initialise_step
from spalf.steps.sanity import random_step
from spalf.steps.train import pack, phase1, phase2

__all__ = [
    "Progress",
    "StepContext",
    "baseline",
    "calibrate",
    "consistency",
    "dashboard",
    "evaluate",
    "initialise_step",
    "pack",
    "phase1",
    "phase2",
    "random_step",
]
