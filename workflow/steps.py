"""What each step of the workflow reads from the configuration, and what it needs to run.

Snakemake reruns a step when its ``params`` change, so a step's params hold exactly the fields it
depends on. How a step executes (device, threads, checkpoint interval) travels in its resources,
which rerun nothing. No torch here: the DAG is built from this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

from spalf.config import EvaluateConfig, RunConfig, schedule

REVISIONS = {
    "calibrate": 1,
    "init": 1,
    "phase1": 1,
    "phase2": 1,
    "evaluate": 1,
    "aggregate": 1,
    "figures": 1,
    "tables": 1,
}
"""Raise a step's number by hand when what it computes changes; it and what follows are rerun."""

_SITE: dict[str, Any] = dict.fromkeys(
    ("model_name", "hook_point", "revision", "backend", "dtype", "trust_remote_code", "dataset"),
    True,
)
_STREAM = _SITE | dict.fromkeys(("total_tokens", "batch_size", "seq_len"), True)
_TRAIN = {name: True for name in RunConfig.model_fields if name not in {"output_dir", "checkpoint"}}

FIELDS: dict[str, dict[str, Any]] = {
    "calibrate": _STREAM
    | {"constants": {"delta_cov", "delta_rank", "kappa"}, "evaluate": {"tokens"}},
    "init": _STREAM
    | dict.fromkeys(("F", "L0_target", "seed"), True)
    | {
        "constants": {"delta_cov", "delta_rank", "kappa", "c_eps"},
        "method": {"whitening", "encoder_init", "anchors", "v_cap", "l0_schedule"},
    },
    "phase1": {k: v for k, v in _TRAIN.items() if k != "evaluate"}
    | {"runtime": {"log_every_steps"}},
    "phase2": {k: v for k, v in _TRAIN.items() if k != "evaluate"}
    | {"runtime": {"log_every_steps"}},
    "evaluate": {k: v for k, v in _TRAIN.items() if k != "runtime"},
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


def _with_evaluation_reserve(config: RunConfig) -> RunConfig:
    """``config`` asking for a power of two of held-out tokens, at least the default number.

    Calibration cuts the evaluation split for every cell. Measuring on a few more tokens should
    not cut it anew and train everything again.
    """
    needed = max(config.evaluate.tokens, config.evaluate.sweep_tokens, EvaluateConfig().tokens)
    reserve = config.evaluate.model_copy(update={"tokens": 2 ** math.ceil(math.log2(needed))})
    return config.model_copy(update={"evaluate": reserve})


def execution(config: RunConfig) -> str:
    """How a step runs, as JSON for ``--runtime``; nothing here reruns anything."""
    return config.runtime.model_dump_json(exclude={"log_every_steps"}, exclude_defaults=True)


def threads(config: RunConfig) -> int:
    """CPU threads of a step: as configured, else four, or one where cells share the CPU."""
    if config.runtime.threads is not None:
        return config.runtime.threads
    return 1 if config.runtime.device == "cpu" else 4


def gpus(config: RunConfig) -> int | None:
    """One GPU unless the configuration says ``cpu``; ``None`` asks for none."""
    return None if config.runtime.device == "cpu" else 1


def memory_mb(step: str, config: RunConfig, attempt: int = 1) -> int:
    """Memory in MB: program, language model, activation buffer and SAE with Adam's moments.

    The width of the language model is not known before it is loaded; d = F/16 is the usual
    expansion factor, and each retry asks for half as much again.
    """
    d_model = max(64, config.F // 16)
    d_vocab = 50_000
    bytes_per_weight = 4 if config.dtype == "float32" else 2
    blocks = 12 * math.ceil(d_model / 64) * d_model**2  # a transformer about d/64 layers deep
    language_model = bytes_per_weight * (blocks + 2 * d_vocab * d_model)
    logits = 3 * 4 * config.batch_size * min(d_vocab, 32 * d_model)
    buffer = 2 * 4 * schedule(config).block_tokens * d_model
    dense = {"calibrate": 8 * 4 * d_model**2, "init": 2 * 4 * 2 * config.F * d_model}
    sae = dense.get(step, 4 * 4 * 2 * config.F * d_model + 6 * 4 * config.batch_size * config.F)
    needed = 1500e6 + 1.2 * (language_model + logits + buffer + sae)
    return math.ceil(needed * (1 + 0.5 * (attempt - 1)) / 1e6)


def minutes(step: str, config: RunConfig, attempt: int = 1) -> int:
    """Wall-clock minutes to ask for, from the token budget; each retry asks for more.

    Assumes a sustained 2 TFLOP/s with a GPU and 10 GFLOP/s a thread without: far below what is
    usual, because a time limit that is too short costs more than one that is too long.
    """
    d_model = max(64, config.F // 16)
    language_model = 2 * 12 * math.ceil(d_model / 64) * d_model**2
    sae = 12 * config.F * d_model
    plan = schedule(config)
    flops = {
        "calibrate": config.total_tokens * language_model,
        "init": plan.block_tokens * (language_model + sae),
        "phase1": plan.phase1_steps * config.batch_size * (language_model + sae),
        "phase2": plan.phase2_steps * config.batch_size * (3 * language_model + sae),
        "evaluate": (config.evaluate.tokens + config.evaluate.sweep_tokens * 8)
        * (2 * language_model + sae)
        * 2,
    }
    rate = 2e12 if gpus(config) else 1e10 * threads(config)
    return attempt * (15 + math.ceil(flops[step] / rate / 60))


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
