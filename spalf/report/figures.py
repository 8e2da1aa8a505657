"""The frontier of a sweep, and how the controller reached each of its points."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spalf.errors import UserError
from spalf.report.records import read_frontier, read_metrics
from spalf.report.style import (
    ABREAST,
    PAGE_WIDTH,
    by_target,
    house_style,
    label_l0,
    legend_above,
    looks,
    octave_axis,
    plain_log_axis,
    save,
)

_FRONTIER_ROWS = (
    ("delta_ce", "ΔCE (nats per token)", "log"),
    ("explained_variance", "explained variance (share)", "linear"),
)

MOST_LINES = 14
"""With more lines than this in the frontier, variants are left to the tables and the manuscript."""

RANDOM = "random"
"""SAEs that nobody trained: so far from the others that they are left to the tables."""


@dataclass(frozen=True)
class _Panel:
    """One panel of the control figure: a column of the metrics log and how it is drawn."""

    column: str
    label: str
    limits: tuple[float | None, float | None] = (None, None)


# A violation starts far out and the controller saturates it at 0.3 (M12): the part near zero is
# what there is to see.
_NEAR_ZERO = (-1.2, 1.2)

_CONTROL_PANELS = (
    _Panel("l0", "L0 (features per token)"),
    _Panel("explained_variance", "expl. variance (share)", (0, 1)),
    _Panel("dead_fraction", "dead (share)", (0, None)),
    _Panel("g_faith", "g, fidelity (no unit)", _NEAR_ZERO),
    _Panel("g_drift", "g, drift (no unit)", _NEAR_ZERO),
    _Panel("g_ortho", "g, orthogonality (no unit)", _NEAR_ZERO),
    _Panel("lambda_faith", "λ, fidelity (no unit)", (0, None)),
    _Panel("lambda_drift", "λ, drift (no unit)", (0, None)),
    _Panel("lambda_ortho", "λ, orthogonality (no unit)", (0, None)),
)


def pareto_figures(frontier: Path, out_dir: Path) -> list[Path]:
    """Draw ``pareto.pdf`` and ``pareto.png``: ΔCE and explained variance against L0.

    One column of panels a model, one line a method or variant, a point per ``L0_target``: the mean
    over seeds, with the standard deviation over seeds as error bars where there are several.
    Random SAEs are left out, and so are variants where there are more than one can tell apart.

    Raises:
        UserError: ``frontier`` is missing or damaged.
    """
    table = read_frontier(frontier)
    _require_columns(table, frontier, ["l0", *(row[0] for row in _FRONTIER_ROWS)])
    return frontier_figure(table, out_dir / "pareto")


def frontier_figure(table: pd.DataFrame, stem: Path, note: str = "") -> list[Path]:
    """`pareto_figures` of a table; ``note`` says below the panels what is missing."""
    trained = table[table["method"] != RANDOM]
    table = table if trained.empty else trained
    if len(table[["method", "variant"]].drop_duplicates()) > MOST_LINES:
        table = table[table["variant"] == ""]
    names = [_line_name(*pair) for pair in zip(table["method"], table["variant"], strict=True)]
    table = table.assign(line=names)
    styles = looks(_in_order(table))
    models = list(dict.fromkeys(table["model"]))
    abreast, deep = min(len(models), ABREAST), -(-len(models) // ABREAST)
    with house_style():
        size = (PAGE_WIDTH, 0.3 + 3.9 * deep + 0.17 * -(-len(styles) // 3))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(2 * deep, abreast, sharex="col", sharey="row", squeeze=False)
        for index, model in enumerate(models):
            row, column = 2 * (index // ABREAST), index % ABREAST
            pair = [panels[row, column], panels[row + 1, column]]
            _frontier_column(pair, model, table[table["model"] == model], styles)
            if column == 0:
                for axes, (_, label, _) in zip(pair, _FRONTIER_ROWS, strict=True):
                    axes.set_ylabel(label)
        for index in range(len(models), abreast * deep):
            for row in (2 * (index // ABREAST), 2 * (index // ABREAST) + 1):
                panels[row, index % ABREAST].set_visible(False)
        legend_above(figure, panels.flat, 4 if len(styles) < 5 else 3)
        return save(figure, stem, note)


def control_figure(model: str, metrics: Iterable[Path], out_dir: Path) -> list[Path]:
    """Draw ``control_<model>.{pdf,png}``: what the controller saw and did in a model's cells.

    L0 with its target, explained variance and dead features; the violation of each constraint;
    and its multiplier, over training tokens. Colour is the cell's ``L0_target``, each seed is a
    line, Phase 2 is shaded.

    Args:
        model: name of the model in the sweep.
        metrics: ``metrics.jsonl`` files below ``…/L0_<target>/seed_<seed>/``, both phases.
        out_dir: directory of the figure.

    Raises:
        UserError: no file was given, or one is missing, damaged, or not in a cell's directory.
    """
    cells = _cells(metrics)
    if not cells:
        raise UserError(f"control.{model}", None, "give the metrics.jsonl of at least one cell")
    colours = by_target(target for target, _ in cells)
    with house_style():
        figure = Figure(figsize=(PAGE_WIDTH, 5.6), layout="constrained")
        panels = figure.subplots(3, 3, sharex=True)
        for axes, panel in zip(panels.flat, _CONTROL_PANELS, strict=True):
            _control_panel(axes, panel, cells, colours)
        for axes in panels[-1]:
            axes.set_xlabel("training tokens (millions)")
        _mark_targets(panels[0, 0], list(colours), colours)
        for target, colour in colours.items():
            panels[0, 0].plot([], [], color=colour, label=f"L0 target {target:g}")
        legend_above(figure, [panels[0, 0]], 6, f"{model} (Phase 2 shaded)")
        return save(figure, out_dir / f"control_{model}")


def _line_name(method: str, variant: str) -> str:
    return f"{method}, {variant}" if variant else method


def _in_order(table: pd.DataFrame) -> list[str]:
    """The lines of the figure: ``spalf`` first, its variants, then the baselines."""
    ours = table["method"] == "spalf"
    return [*table[ours].sort_values("variant", kind="stable")["line"], *table[~ours]["line"]]


def _frontier_column(
    panels: Sequence[Axes], model: str, table: pd.DataFrame, styles: dict[str, dict[str, Any]]
) -> None:
    panels[0].set_title(model)
    panels[-1].set_xlabel("L0 (features per token)")
    on_target = ((table["l0"] / table["L0_target"] - 1).abs() < 0.2).all()
    for axes, (column, _, scale) in zip(panels, _FRONTIER_ROWS, strict=True):
        label_l0(axes, sorted(table["L0_target"].unique()) if on_target else [])
        # A logarithm has no place for a ΔCE of zero or below; such a figure stays linear.
        if scale == "log" and (table[column] > 0).all():
            axes.set_yscale("log")
            plain_log_axis(axes.yaxis)
        for line, look in styles.items():
            rows = table[table["line"] == line]
            if not rows.empty:
                _frontier_line(axes, rows, column, look, line)


def _frontier_line(
    axes: Axes, rows: pd.DataFrame, column: str, look: dict[str, Any], label: str
) -> None:
    by_target = rows.groupby("L0_target")[["l0", column]]
    mean, spread = by_target.mean(), by_target.std(ddof=1)
    bars: dict[str, Any] = {}
    if (by_target.size() > 1).any():
        bars = {"xerr": spread["l0"], "yerr": spread[column]}
    axes.errorbar(mean["l0"], mean[column], **bars, **look, capsize=2, label=label)


def _cells(metrics: Iterable[Path]) -> dict[tuple[float, int], pd.DataFrame]:
    """The log of each cell, both phases in order, by (L0_target, seed)."""
    parts: dict[tuple[float, int], list[pd.DataFrame]] = {}
    for path in metrics:
        found = re.search(r"L0_([^/\\]+)[/\\]seed_(\d+)[/\\]", str(path))
        if found is None:
            remedy = "expected a path with L0_<target>/seed_<seed>/ in it"
            raise UserError("control", str(path), remedy)
        parts.setdefault((float(found[1]), int(found[2])), []).append(read_metrics(path))
    joined = {key: pd.concat(logs, ignore_index=True) for key, logs in sorted(parts.items())}
    return {
        key: log.drop_duplicates(["phase", "step"]).sort_values(["phase", "step"])
        for key, log in joined.items()
    }


def _control_panel(
    axes: Axes,
    panel: _Panel,
    cells: dict[tuple[float, int], pd.DataFrame],
    colours: dict[float, Any],
) -> None:
    axes.set_ylabel(panel.label)
    for (target, _), log in cells.items():
        if panel.column in log:
            values = pd.to_numeric(log[panel.column])
            axes.plot(log["tokens"] / 1e6, values, color=colours[target], linewidth=1, alpha=0.85)
    _limit(axes, panel)
    start, end = _phase2_span(cells.values())
    if start is not None:
        axes.axvspan(start / 1e6, end / 1e6, color="#000000", alpha=0.07, linewidth=0)


def _phase2_span(logs: Iterable[pd.DataFrame]) -> tuple[float | None, float]:
    """Tokens at which the first cell left Phase 1 for Phase 2, and at which the last one ended."""
    logs = list(logs)
    starts = [
        float(log.loc[log["phase"] == 1, "tokens"].max())
        for log in logs
        if {1, 2} <= set(log["phase"])
    ]
    return min(starts, default=None), max(float(log["tokens"].max()) for log in logs)


def _limit(axes: Axes, panel: _Panel) -> None:
    low, high = axes.get_ylim()
    bottom, top = panel.limits
    if panel.limits == _NEAR_ZERO:
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylim(max(low, _NEAR_ZERO[0]), min(max(high, 0.1), _NEAR_ZERO[1]))
    elif top is not None:
        axes.set_ylim(max(low, bottom or 0), min(high, top))
    elif bottom is not None:
        top = high if high > 0.06 else 0.06
        axes.set_ylim(bottom - 0.02 * top, top)  # a line that stays at zero must be seen


def _mark_targets(axes: Axes, targets: Sequence[float], colours: dict[float, Any]) -> None:
    axes.set_yscale("log")
    octave_axis(axes.yaxis)
    for target in targets:
        axes.axhline(target, color=colours[target], linestyle="--", linewidth=0.9)


def _require_columns(table: pd.DataFrame, path: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise UserError(str(path), None, f"lacks the columns {', '.join(missing)}; aggregate again")
