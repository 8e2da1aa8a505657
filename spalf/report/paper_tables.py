"""What the manuscript prints, as tables of text: each row ready for the page, nothing typed."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

NONE = "–"
"""Shown where there is no number."""


@dataclass(frozen=True)
class Result:
    """One SAE's ``evaluation.json`` and where it was found.

    Attributes:
        place: directory of the cell below the results, such as ``demo-2l/L0_8/seed_0``.
        data: the file as it was read.
        seconds: wall-clock time of its training steps, where benchmarks were kept.
    """

    place: str
    data: Mapping[str, Any]
    seconds: float | None

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


LABEL = ("model", "method", "L0 asked", "seed")


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    name: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv`` and ``<name>.tex`` (booktabs) into ``folder``."""
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])
        table = pd.DataFrame(list(self.rows), columns=list(self.header), dtype=str)
        styler = table.style.hide(axis="index").format(escape="latex")
        styler = styler.format_index(escape="latex", axis="columns")
        (folder / f"{self.name}.tex").write_text(styler.to_latex(hrules=True), encoding="utf-8")


def number(value: Any, form: str = ".3f") -> str:
    """``value`` in the format ``form``; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    return format(value, form).replace("-", "−")


def frontier_sheet(results: Sequence[Result]) -> Sheet:
    """The final SAE of each cell on held-out tokens; ± is one standard error over sequences."""
    header = (*LABEL, "L0", "EV", "ΔCE", "CE recovered", "KL", "dead", "dense")
    rows = []
    for result in results:
        final = result.data["phases"][result.data["final"]]
        rows.append(
            (
                *result.label,
                _with_error(final, "l0", ".2f"),
                number(final["explained_variance"]),
                _with_error(final, "delta_ce", ".3f"),
                number(final["ce_recovered"]),
                _with_error(final, "kl", ".3f"),
                number(final["dead_fraction"], ".1%"),
                number(final.get("dense_fraction"), ".1%"),
            )
        )
    return Sheet("frontier", header, rows)


def _with_error(metrics: Mapping[str, Any], name: str, form: str) -> str:
    error = metrics.get(f"{name}_se")
    return number(metrics[name], form) + (f" ± {number(error, form)}" if error is not None else "")


def phases_sheet(results: Sequence[Result]) -> Sheet:
    """ΔCE, explained variance and L0 at the end of each phase; SPALF's SAEs only."""
    header = (*LABEL, "L0, 1", "L0, 2", "EV, 1", "EV, 2", "ΔCE, 1", "ΔCE, 2", "ratio")
    rows = []
    for result in results:
        phases = result.data["phases"]
        if not {"phase1", "phase2"} <= set(phases):
            continue
        one, two = phases["phase1"], phases["phase2"]
        pairs = [(one[k], two[k]) for k in ("l0", "explained_variance", "delta_ce")]
        forms = (".2f", ".3f", ".3f")
        values = [number(v, f) for pair, f in zip(pairs, forms, strict=True) for v in pair]
        ratio = two["delta_ce"] / one["delta_ce"] if one["delta_ce"] > 0 else None
        rows.append((*result.label, *values, number(ratio, ".2f")))
    return Sheet("phases", header, rows)


def control_sheet(results: Sequence[Result]) -> Sheet:
    """Settling, ∫v² and multipliers of Phase 1, with the slope of the frontier beside λ."""
    names = ("settled at step", "∫v² fidelity", "∫v² orthog.", "λ fidelity", "slope")
    header = (*LABEL, *names, "Phase 1 ended by")
    slopes = frontier_slopes(results)
    rows = []
    for result in results:
        found = result.data.get("controller", {}).get("phase1")
        if not found:
            continue
        squares = found["integral_v2"]
        rows.append(
            (
                *result.label,
                number(found["settling_step"], "d"),
                number(squares.get("faith"), ".2f"),
                number(squares.get("ortho"), ".2f"),
                number(found["lambda_final"].get("faith"), ".2f"),
                number(slopes.get(result.place), ".2f"),
                str(found.get("ended_by") or NONE),
            )
        )
    return Sheet("control", header, rows)


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


def comparison_sheet(frontier: pd.DataFrame) -> Sheet:
    """ΔCE of baselines and variants over SPALF's own at the same L0, by model.

    SPALF's curve is the mean over seeds, interpolated in log L0 and log ΔCE; points outside its
    range are not compared.
    """
    header = ("model", "against SPALF", "ΔCE ratio", "lowest", "highest", "SAEs", "outside")
    named = frontier.assign(line=frontier["variant"].where(frontier["variant"] != "", "spalf"))
    named["line"] = named["line"].where(named["method"] == "spalf", named["method"])
    rows: list[tuple[str, ...]] = []
    for model, table in named.groupby("model", sort=False):
        own = table[(table["line"] == "spalf") & (table["delta_ce"] > 0)]
        curve = own.groupby("L0_target")[["l0", "delta_ce"]].mean().sort_values("l0")
        others = table[(table["line"] != "spalf") & (table["delta_ce"] > 0)]
        for line, points in others.groupby("line", sort=False):
            rows.append((str(model), str(line), *_ratio(points, curve)))
    return Sheet("comparison", header, rows)


def _ratio(points: pd.DataFrame, curve: pd.DataFrame) -> tuple[str, ...]:
    if len(curve) < 2:
        return (NONE, NONE, NONE, "0", str(len(points)))
    low, high = curve["l0"].min(), curve["l0"].max()
    # A few percent beyond the last point is where a controller that met its target lands.
    inside = points[(points["l0"] >= 0.97 * low) & (points["l0"] <= 1.03 * high)]
    logs = [np.log(curve[name].to_numpy()) for name in ("l0", "delta_ce")]
    expected = np.interp(np.log(inside["l0"].to_numpy()), *logs)
    ratio = np.exp(np.log(inside["delta_ce"].to_numpy()) - expected)
    outside = str(len(points) - len(inside))
    if not len(ratio):
        return (NONE, NONE, NONE, "0", outside)
    mean = float(np.exp(np.log(ratio).mean()))
    shown = [number(float(x), ".2f") for x in (mean, ratio.min(), ratio.max())]
    return (*shown, str(len(ratio)), outside)


def cost_sheet(results: Sequence[Result], batch_size: Mapping[str, int]) -> Sheet:
    """Optimiser steps, tokens and wall-clock time of each SAE's training."""
    header = (*LABEL, "steps", "tokens, Phase 1", "tokens, all", "minutes")
    rows = []
    for result in results:
        phases = result.data["phases"]
        total = phases[result.data["final"]].get("train_tokens")
        first = phases.get("phase1", {}).get("train_tokens")
        size = batch_size.get(result.cell["model"])
        steps = round(total / size) if total and size else None
        minutes = result.seconds / 60 if result.seconds is not None else None
        values = [number(v, ",d") for v in (steps, first, total)]
        rows.append((*result.label, *values, number(minutes, ".1f")))
    return Sheet("cost", header, rows)


def drift_sheet(results: Sequence[Result]) -> Sheet:
    """Cosine of anchored columns with their token directions; SAEs with anchors only."""
    header = (*LABEL, "anchored columns", "mean cosine", "smallest cosine")
    rows = []
    for result in results:
        found = result.data.get("drift", {})
        if found.get("n_anchored"):
            cosines = [number(found[k]) for k in ("mean_cosine", "min_cosine")]
            rows.append((*result.label, str(found["n_anchored"]), *cosines))
    return Sheet("drift", header, rows)


def absorption_sheets(results: Sequence[Result]) -> tuple[Sheet, Sheet]:
    """First-letter absorption where it was measured, and why not where it was not."""
    measured, skipped = [], []
    for result in results:
        found = result.data.get("absorption", {"skipped": "not in this evaluation"})
        if "skipped" in found:
            skipped.append((*result.label, str(found["skipped"])))
            continue
        scalars = {k: v for k, v in found.items() if isinstance(v, int | float)}
        text = ", ".join(f"{k.replace('_', ' ')} {number(v, '.3g')}" for k, v in scalars.items())
        measured.append((*result.label, text))
    return (
        Sheet("absorption", (*LABEL, "first-letter absorption"), measured),
        Sheet("absorption_skipped", (*LABEL, "reason"), skipped),
    )


def missing_sheet(missing: Iterable[str]) -> Sheet:
    """The cells of the grid that have no evaluation."""
    return Sheet("missing", ("cell",), [(place,) for place in missing])
