"""What each step of the workflow reads from the configuration.

Snakemake reruns a step when its ``params`` change, so a step's params hold exactly the fields it
depends on. How a step executes (device, threads, checkpoint interval) travels in its resources,
which rerun nothing (`workflow.resources`). No torch here: the DAG is built from this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from spalf.config import EvaluateConfig, RunConfig, SweepConfig

REVISIONS = {
    "calibrate": 5,
    "init": 5,
    "phase1": 8,
    "phase2": 8,
    "pack": 6,
    "baseline": 2,
    "random": 1,
    "evaluate": 2,
    "evaluate_baseline": 2,
    "consistency": 1,
    "aggregate": 3,
    "figures": 3,
    "tables": 4,
    "dashboard": 3,
    "dashboard_baseline": 2,
    "paper": 3,
}
"""Raise a step's number by hand when what it computes changes; it and what follows are rerun."""

_SITE: dict[str, Any] = dict.fromkeys(
    ("model_name", "hook_point", "revision", "backend", "dtype", "trust_remote_code", "dataset"),
    True,
)
_STREAM = _SITE | dict.fromkeys(("total_tokens", "batch_size", "seq_len"), True)
_ELSEWHERE = {"output_dir", "checkpoint", "baselines"}
_TRAIN = {name: True for name in RunConfig.model_fields if name not in _ELSEWHERE}
_CALIBRATION: dict[str, Any] = {
    "constants": {"delta_cov", "delta_rank", "kappa"},
    "method": {"whitening"},
}
_CELL = dict.fromkeys(("F", "L0_target", "seed"), True)

FIELDS: dict[str, dict[str, Any]] = {
    "calibrate": _STREAM | _CALIBRATION | {"evaluate": {"tokens"}},
    "init": _STREAM
    | _CELL
    | {
        "constants": {"delta_cov", "delta_rank", "kappa", "c_eps"},
        "method": {"whitening", "metric", "encoder_init", "anchors", "v_cap", "l0_schedule"},
    },
    "phase1": {k: v for k, v in _TRAIN.items() if k != "evaluate"}
    | {"runtime": {"log_every_steps"}},
    "phase2": {k: v for k, v in _TRAIN.items() if k != "evaluate"}
    | {"runtime": {"log_every_steps"}},
    "pack": {k: v for k, v in _TRAIN.items() if k not in ("evaluate", "L0_target", "seed")}
    | {"runtime": {"log_every_steps"}},
    "baseline": _STREAM | _CALIBRATION | _CELL | {"baselines": True},
    "random": _STREAM | _CALIBRATION | _CELL,
    "evaluate": {k: v for k, v in _TRAIN.items() if k != "runtime"},
    "evaluate_baseline": _STREAM | _CALIBRATION | _CELL | {"R2_target": True, "evaluate": True},
    "dashboard": {k: v for k, v in _TRAIN.items() if k != "runtime"} | {"evaluate": {"tokens"}},
    "dashboard_baseline": _STREAM | _CALIBRATION | _CELL | {"evaluate": {"tokens"}},
}
"""The fields of `RunConfig` each step depends on, as pydantic's ``include``."""


def settings(step: str, config: RunConfig) -> str:
    """The part of ``config`` that ``step`` depends on, as canonical JSON for ``--settings``.

    Fields at their default are left out, so writing a default down, or a new version that adds a
    field, reruns nothing.
    """
    if step == "calibrate":
        config = _with_evaluation_reserve(config)
    data = config.model_dump(mode="json", include=FIELDS[step], exclude_defaults=True)
    return json.dumps({k: v for k, v in data.items() if v != {}}, sort_keys=True)


def sweep_settings(sweep: SweepConfig) -> str:
    """The grid that a report is about, as JSON; how it was executed left out.

    Models and variants stay in the order of the file, in which tables have them.
    """
    data = sweep.model_dump(mode="json", exclude={"runtime", "pack"}, exclude_defaults=True)
    return json.dumps(data)


def origin(
    rule: str, configfiles: Sequence[str], overrides: Mapping[str, Any], sweep: SweepConfig
) -> str:
    """What a record of provenance says of the workflow (`spalf.report.provenance`), as JSON."""
    said = {
        "rule": rule,
        "configfiles": list(configfiles),
        "overrides": [f"{key}={json.dumps(value)}" for key, value in overrides.items()],
        "settings": json.loads(sweep_settings(sweep)),
    }
    return json.dumps(said, sort_keys=True)


def _with_evaluation_reserve(config: RunConfig) -> RunConfig:
    """``config`` asking for a power of two of held-out tokens, at least the default number.

    Calibration cuts the evaluation split for every cell. Measuring on a few more tokens should
    not cut it anew and train everything again.
    """
    needed = max(config.evaluate.tokens, config.evaluate.sweep_tokens, EvaluateConfig().tokens)
    reserve = config.evaluate.model_copy(update={"tokens": 2 ** math.ceil(math.log2(needed))})
    return config.model_copy(update={"evaluate": reserve})


def typed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``--config`` values with the types YAML gives them.

    Snakemake reads nested values given by ``--config`` as strings, ``{L0_target: ["8"]}``.
    """
    return {
        key: value if isinstance(value, str) else _typed(value) for key, value in overrides.items()
    }


def _typed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_typed(item) for item in value]
    return yaml.safe_load(value) if isinstance(value, str) else value
