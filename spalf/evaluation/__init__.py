"""What a trained SAE is worth: measurements on held-out tokens and of the dictionary itself."""

from spalf.evaluation.absorption import (
    AbsorptionMeasurement,
    evaluate_absorption,
    first_letter_absorption,
)
from spalf.evaluation.consistency import mean_pairwise_consistency, pw_mcc
from spalf.evaluation.control import control_summary, integral_v2, settling_step
from spalf.evaluation.dictionary import decoder_cosines
from spalf.evaluation.downstream import (
    DownstreamMeasurement,
    DownstreamMetrics,
    evaluate_downstream,
)
from spalf.evaluation.drift import anchor_drift
from spalf.evaluation.probing import (
    PROBED_TOKENS,
    ProbingMeasurement,
    ProbingOptions,
    probe_tasks,
)
from spalf.evaluation.protocols import Measurement, PatchableModel, SparseCoder
from spalf.evaluation.source_labels import TASKS, TokenLabels, encoder, label_tokens
from spalf.evaluation.threshold_sweep import ThresholdSweep, threshold_sweep
from spalf.evaluation.words import (
    AbsorptionOptions,
    WordActivations,
    collect_words,
    first_letters,
)

__all__ = [
    "PROBED_TOKENS",
    "TASKS",
    "AbsorptionMeasurement",
    "AbsorptionOptions",
    "DownstreamMeasurement",
    "DownstreamMetrics",
    "Measurement",
    "PatchableModel",
    "ProbingMeasurement",
    "ProbingOptions",
    "SparseCoder",
    "ThresholdSweep",
    "TokenLabels",
    "WordActivations",
    "anchor_drift",
    "collect_words",
    "control_summary",
    "decoder_cosines",
    "encoder",
    "evaluate_absorption",
    "evaluate_downstream",
    "first_letter_absorption",
    "first_letters",
    "integral_v2",
    "label_tokens",
    "mean_pairwise_consistency",
    "probe_tasks",
    "pw_mcc",
    "settling_step",
    "threshold_sweep",
]
