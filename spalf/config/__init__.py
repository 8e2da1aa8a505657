"""Configuration: frozen types, YAML in and out, and the parameters derived from them."""

from spalf.config.constants import StructuralConstants
from spalf.config.derived import Derived, Schedule, describe, schedule
from spalf.config.io import load_run, load_sweep, parse, parse_sweep, to_yaml
from spalf.config.sweep import Cell, ModelEntry, SweepConfig, VariantEntry
from spalf.config.types import (
    BASELINES,
    RANDOM,
    BaselinesConfig,
    DatasetConfig,
    EvaluateConfig,
    MethodConfig,
    RunConfig,
    RuntimeConfig,
)

__all__ = [
    "BASELINES",
    "RANDOM",
    "BaselinesConfig",
    "Cell",
    "DatasetConfig",
    "Derived",
    "EvaluateConfig",
    "MethodConfig",
    "ModelEntry",
    "RunConfig",
    "RuntimeConfig",
    "Schedule",
    "StructuralConstants",
    "SweepConfig",
    "VariantEntry",
    "describe",
    "load_run",
    "load_sweep",
    "parse",
    "parse_sweep",
    "schedule",
    "to_yaml",
]
