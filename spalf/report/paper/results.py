"""What the manuscript is made from: every SAE's evaluation, as read and as one table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from spalf.errors import UserError
from spalf.report.records import read_evaluation

RANDOM = "random"
QUESTIONS = {
    "string": ("in_string",),
    "comment": ("in_comment",),
    "keyword": ("keyword",),
    "indentation": ("indent_0", "indent_1", "indent_2", "indent_3_or_more"),
}
"""What the probes are asked, and the tasks of an evaluation that make up each question."""

PROBES = ("k1", "k5", "all")
"""Probes of one feature, of five, and of the activations themselves."""

STEPS = ("init", "phase1", "phase2", "baseline", "random", "evaluate")
"""Steps whose cost is told, where the workflow's benchmarks were kept."""

CURVE = ["model", "line", "L0_target"]
"""What tells the rows of a table of means over seeds apart."""


@dataclass(frozen=True)
class Result:
    """One SAE's ``evaluation.json`` and where it was found.

    Attributes:
        place: directory of the cell below the results, such as ``demo-2l/L0_8/seed_0``.
        data: the file as it was read.
        seconds: wall-clock time of its steps, by name, where benchmarks were kept.
        memory_mb: the largest resident memory of a training step, where that is known.
    """

    place: str
    data: Mapping[str, Any]
    seconds: Mapping[str, float]
    memory_mb: float | None = None

    @property
    def cell(self) -> Mapping[str, Any]:
        """Which SAE it is."""
        found: Mapping[str, Any] = self.data["cell"]
        return found

    @property
    def line(self) -> str:
        """Method, or variant of the method."""
        return str(self.cell.get("variant") or self.cell["method"])

    @property
    def label(self) -> tuple[str, str, str, str]:
        """Model, line, L0 target and seed, as text."""
        cell = self.cell
        return (cell["model"], self.line, f"{cell['L0_target']:g}", str(cell["seed"]))

    @property
    def final(self) -> Mapping[str, Any]:
        """Metrics of the final SAE."""
        found: Mapping[str, Any] = self.data["phases"][self.data["final"]]
        return found


def read_results(results: Path, places: Iterable[str]) -> list[Result]:
    """The evaluations below ``results``, in the order of ``places``.

    Raises:
        UserError: one is damaged; it is named.
    """
    found = []
    for place in places:
        path = results / place / "evaluation.json"
        read_evaluation(path)  # says what is wrong with it, if anything is
        data = json.loads(path.read_text(encoding="utf-8"))
        seconds, memory = _cost(results / place / "benchmarks")
        found.append(Result(place, data, seconds, memory))
    return found


def is_evaluation(name: str) -> bool:
    """Whether a result of the grid is of one SAE; the others compare seeds."""
    return name.endswith("/evaluation.json")


def read_consistency(path: Path) -> Mapping[str, Any]:
    """One ``consistency.json``.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pairs = [float(score) for score in found["pairs"]]
    except (OSError, ValueError, KeyError, TypeError):
        remedy = "is missing or damaged; delete it and run `spalf consistency` again"
        raise UserError(str(path), None, remedy) from None
    return {"pw_mcc": float(found["pw_mcc"]), "pairs": pairs}


def _cost(benchmarks: Path) -> tuple[dict[str, float], float | None]:
    """Seconds of each step, and the largest resident memory of those that train, in MB."""
    seconds: dict[str, float] = {}
    memory: list[float] = []
    for step in STEPS:
        path = benchmarks / f"{step}.tsv"
        if not path.exists():
            continue
        table = pd.read_csv(path, sep="\t")
        seconds[step] = float(pd.to_numeric(table["s"], errors="coerce").sum())
        if step != "evaluate" and "max_rss" in table:
            memory += pd.to_numeric(table["max_rss"], errors="coerce").dropna().tolist()
    return seconds, max(memory, default=None)


def as_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row an SAE, one column a number; what was not measured is missing."""
    slopes = frontier_slopes(results)
    rows = [_row(result) | {"slope": slopes.get(result.place)} for result in results]
    return pd.DataFrame(rows)


def _row(result: Result) -> dict[str, Any]:
    cell, data = result.cell, result.data
    named = {"place": result.place, "model": cell["model"], "line": result.line}
    named |= {name: cell[name] for name in ("method", "L0_target", "seed", "F")}
    named |= {"variant": cell.get("variant") or "", "lr": cell.get("lr")}
    row = {**named, **result.final}
    row |= {
        f"{name}_features": _count(result.final.get(f"{name}_fraction"), cell["F"])
        for name in ("dead", "dense")
    }
    row |= {"l0_error": result.final["l0"] / cell["L0_target"] - 1}
    row |= _phases(data["phases"]) | _control(data) | _probing(data) | _absorption(data)
    row |= {f"decoder_{k}": v for k, v in _scalars(data.get("decoder")).items()}
    near = (data.get("decoder") or {}).get("near") or {}
    row |= {f"near_{limit}": share for limit, share in near.items()}
    row |= {f"drift_{k}": v for k, v in _scalars(data.get("drift")).items()}
    row |= {f"seconds_{step}": value for step, value in result.seconds.items()}
    return row | {"memory_mb": result.memory_mb}


def _count(fraction: float | None, features: int) -> int | None:
    return None if fraction is None else round(fraction * features)


def _scalars(found: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (found or {}).items() if isinstance(v, int | float)}


def _phases(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What Phase 1 left, and by what Phase 2 multiplied ΔCE."""
    if not {"phase1", "phase2"} <= set(phases):
        return {}
    one, two = phases["phase1"], phases["phase2"]
    names = ("l0", "explained_variance", "delta_ce", "mse", "train_tokens")
    row = {f"phase1_{name}": one.get(name) for name in names}
    ratio = two["delta_ce"] / one["delta_ce"] if one["delta_ce"] > 0 else None
    return row | {"phase2_ratio": ratio}


def _control(data: Mapping[str, Any]) -> dict[str, Any]:
    """How the controller did in Phase 1."""
    found = (data.get("controller") or {}).get("phase1")
    if not found:
        return {}
    row = {"settling_step": found["settling_step"], "ended_by": found.get("ended_by")}
    row |= {f"v2_{name}": value for name, value in found["integral_v2"].items()}
    return row | {f"lambda_{name}": value for name, value in found["lambda_final"].items()}


def _probing(data: Mapping[str, Any]) -> dict[str, Any]:
    """Balanced accuracy by question and probe, ``probe_<k>_<question>``, and ``probe_<k>``."""
    tasks = (data.get("probing") or {}).get("tasks", {})
    row: dict[str, Any] = {}
    for probe in PROBES:
        means = {
            question: fmean(tasks[name][probe]["accuracy"] for name in names if name in tasks)
            for question, names in QUESTIONS.items()
            if any(name in tasks for name in names)
        }
        row |= {f"probe_{probe}_{question}": mean for question, mean in means.items()}
        row |= {f"probe_{probe}": fmean(means.values())} if means else {}
    return row


def _absorption(data: Mapping[str, Any]) -> dict[str, Any]:
    found = data.get("absorption") or {}
    names = ("rate", "probe_accuracy", "feature_accuracy", "n_cases")
    return {f"absorption_{name}": found[name] for name in names if name in found}


def frontier_slopes(results: Sequence[Result]) -> dict[str, float]:
    """−d log L0 / d log MSE at the end of Phase 1, by place, from neighbouring L0 targets.

    This is what λ_faith should equal at rest (M10). Central differences inside a curve, one-sided
    ones at its ends; a curve is one model, line and seed, and needs two points.
    """
    curves: dict[tuple[str, str, str], list[tuple[float, float, str]]] = {}
    for result in results:
        metrics = result.data["phases"].get("phase1")
        if metrics and metrics["l0"] > 0 and metrics["mse"] > 0:
            model, line, _, seed = result.label
            point = (math.log(metrics["l0"]), math.log(metrics["mse"]), result.place)
            curves.setdefault((model, line, seed), []).append(point)
    slopes: dict[str, float] = {}
    for curve in curves.values():
        curve.sort()
        for i, (_, _, place) in enumerate(curve):
            (x0, y0, _), (x1, y1, _) = curve[max(i - 1, 0)], curve[min(i + 1, len(curve) - 1)]
            if y1 != y0:
                slopes[place] = -(x1 - x0) / (y1 - y0)
    return slopes
