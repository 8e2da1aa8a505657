"""Every cell's ``evaluation.json`` in two tables: the frontier, and what each phase gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from spalf.errors import UserError
from spalf.report.files import replacing
from spalf.report.records import Evaluation, read_evaluation

FRONTIER_COLUMNS = (
    "model",
    "hook_point",
    "method",
    "L0_target",
    "seed",
    "l0",
    "explained_variance",
    "ce_clean",
    "ce_sae",
    "delta_ce",
    "ce_recovered",
    "kl",
    "dead_fraction",
    "lambda_faith",
    "tokens",
    "l0_error",
    "l0_se",
    "delta_ce_se",
    "kl_se",
    "mse",
    "ce_zero",
    "dense_fraction",
    "F",
    "R2_target",
    "train_tokens",
    "model_name",
    "variant",
    "lr",
    "hyperparameters",
)
"""Columns of ``frontier.csv``; ``l0_error`` is l0/L0_target − 1, ``*_se`` are standard errors."""

PHASE_COLUMNS = (*FRONTIER_COLUMNS[:5], "phase", *FRONTIER_COLUMNS[5:])
"""Columns of ``phases.csv``."""

_CELL = ["model", "hook_point", "method", "variant", "L0_target", "seed"]


def aggregate(evaluations: Iterable[Path], out_dir: Path) -> tuple[Path, Path]:
    """Write ``frontier.csv`` and ``phases.csv``, sorted by cell, into ``out_dir``.

    ``frontier.csv`` has one row per cell and holds the final autoencoder only; ``phases.csv`` has
    one row per cell and phase.

    Returns:
        The two paths.

    Raises:
        UserError: no file was given, a file is missing or damaged, or two describe one cell.
    """
    paths = list(evaluations)
    if not paths:
        raise UserError("EVALUATION_JSON", None, "give at least one evaluation.json")
    read = [read_evaluation(path) for path in paths]
    _require_distinct(read, paths)
    phases = pd.DataFrame([row for evaluation in read for row in _rows(evaluation)])
    phases = phases.astype({"lambda_faith": float, "lr": float, "train_tokens": "Int64"})
    phases = phases.sort_values([*_CELL, "phase"], kind="stable")
    out_dir.mkdir(parents=True, exist_ok=True)
    frontier_path, phases_path = out_dir / "frontier.csv", out_dir / "phases.csv"
    _write(phases[phases["final"]], FRONTIER_COLUMNS, frontier_path)
    _write(phases, PHASE_COLUMNS, phases_path)
    return frontier_path, phases_path


def _rows(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    for phase, metrics in evaluation.phases.items():
        yield {
            **evaluation.cell.model_dump(),
            **metrics.model_dump(),
            "phase": phase,
            "final": phase == evaluation.final,
            "l0_error": metrics.l0 / evaluation.cell.L0_target - 1,
            "hyperparameters": _listed(evaluation.cell.hyperparameters),
        }


def _listed(hyperparameters: Mapping[str, Any]) -> str:
    """``name=value`` pairs, the values of a list with spaces between them."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(map(shown, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name}={shown(value)}" for name, value in hyperparameters.items())


def _require_distinct(evaluations: list[Evaluation], paths: list[Path]) -> None:
    seen: dict[tuple[Any, ...], Path] = {}
    for evaluation, path in zip(evaluations, paths, strict=True):
        key = tuple(getattr(evaluation.cell, name) for name in _CELL)
        if key in seen:
            raise UserError(str(path), None, f"describes the same cell as {seen[key]}; give one")
        seen[key] = path


def _write(table: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    with replacing(path) as temporary:
        table.to_csv(
            temporary, columns=list(columns), index=False, float_format="%.6g", lineterminator="\n"
        )
