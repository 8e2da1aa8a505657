"""What a trained SAE is worth: measurements on held-out tokens and of the dictionary itself."""

from spalf.evaluation.absorption import (
    AbsorptionMeasurement,
    evaluate_absorption,
    first_letter_absorption,
)
from spalf.evaluation.consistency import mean_pairwise_consistency, pw_mcc
from spalf.evaluation.control import control_summary, integral_v2, settling_step
from spalf.evaluation.downstream import (
    DownstreamMeasurement,
    DownstreamMetrics,
    evaluate_downstream,
)
from spalf.evaluation.drift import anchor_drift
from spalf.evaluation.protocols import Measurement, PatchableModel, SparseCoder
from spalf.evaluation.threshold_sweep import ThresholdSweep, threshold_sweep
from spalf.evaluation.words import (
    AbsorptionOptions,
    WordActivations,
    collect_words,
    first_letters,
)

__all__ = [
    "AbsorptionMeasurement",
    "AbsorptionOptions",
    "DownstreamMeasurement",
    "DownstreamMetrics",
    "Measurement",
    "PatchableModel",
    "SparseCoder",
    "ThresholdSweep",
    "WordActivations",
    "anchor_drift",
    "collect_words",
    "control_summary",
    "evaluate_absorption",
    "evaluate_downstream",
    "first_letter_absorption",
    "first_letters",
    "integral_v2",
    "mean_pairwise_consistency",
    "pw_mcc",
    "settling_step",
    "threshold_sweep",
]
