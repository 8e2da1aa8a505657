"""The manuscript's own figures, drawn at the width they are printed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from spalf.report.paper_tables import Result
from spalf.report.records import read_metrics
from spalf.report.style import house_style, octave_axis, plain_log_axis, save, sequential

PAGE_WIDTH = 6.5
"""Inches of text on the page; figures are this wide so that their letters keep their size."""

SUFFIXES = (".pdf", ".png")

Colours = Mapping[float, Any]


def course_figure(
    model: str, logs: Mapping[tuple[float, int], Sequence[Path]], out_dir: Path, note: str = ""
) -> None:
    """``course_<model>.{pdf,png}``: L0 and λ_faith over training, one line a cell.

    Args:
        model: name of the model in the sweep.
        logs: metrics logs of both phases, by (L0_target, seed).
        out_dir: directory of the figure.
        note: what is missing, to be said below the panels.

    Raises:
        UserError: a log is damaged.
    """
    colours = _colours([target for target, _ in logs])
    with house_style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (target, seed), paths in sorted(logs.items()):
            label = (
                f"L0 target {target:g}" if seed == min(s for t, s in logs if t == target) else ""
            )
            for path in paths:
                log = read_metrics(path)
                millions = log["tokens"] / 1e6
                look = {"color": colours[target], "linewidth": 1}
                left.plot(millions, log["l0"], label=label, **look)
                right.plot(millions, log["lambda_faith"], **look)
                label = ""
            left.axhline(target, color=colours[target], linestyle="--", linewidth=0.8)
        left.set_yscale("log")
        octave_axis(left.yaxis)
        left.set_ylabel("L0 (active features per token)")
        right.set_ylabel("λ of fidelity (no unit)")
        for axes in (left, right):
            axes.set_xlabel("training tokens (millions)")
        _finish(figure, left, out_dir / f"course_{model}", note)


def sweep_figure(results: Sequence[Result], out_dir: Path, note: str = "") -> bool:
    """``sweep.{pdf,png}``: ΔCE against L0 as all thresholds of a SPALF SAE are scaled.

    One panel a model; a line is one SAE, its marker the SAE as trained. Variants are left out.

    Returns:
        Whether there was anything to draw.
    """
    ours = [r for r in results if r.line == "spalf" and r.data.get("threshold_sweep")]
    models = list(dict.fromkeys(str(r.cell["model"]) for r in ours))
    if not ours:
        return False
    colours = _colours([r.cell["L0_target"] for r in ours])
    with house_style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            _sweep_panel(axes, [r for r in ours if r.cell["model"] == model], colours)
            axes.set_title(model)
            axes.set_xlabel("L0 (active features per token)")
        panels[0].set_ylabel("ΔCE (nats per token)")
        _finish(figure, panels[0], out_dir / "sweep", note)
    return True


def _sweep_panel(axes: Axes, results: Sequence[Result], colours: Colours) -> None:
    axes.set_xscale("log")
    octave_axis(axes.xaxis)
    seen: set[float] = set()
    positive = True
    for result in results:
        target = result.cell["L0_target"]
        points = [p for p in result.data["threshold_sweep"] if p["l0"] > 0]
        label = "" if target in seen else f"L0 target {target:g}"
        seen.add(target)
        x, y = [p["l0"] for p in points], [p["delta_ce"] for p in points]
        positive = positive and min(y) > 0
        axes.plot(x, y, color=colours[target], label=label)
        trained = [p for p in points if p["factor"] == 1]
        x, y = [p["l0"] for p in trained], [p["delta_ce"] for p in trained]
        axes.plot(x, y, "o", color=colours[target])
    # A logarithm has no place for a ΔCE of zero or below; such a figure stays linear.
    if positive:
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _colours(targets: Sequence[float]) -> Colours:
    distinct = sorted(set(targets))
    return dict(zip(distinct, sequential(len(distinct)), strict=True))


def _finish(figure: Figure, axes: Axes, stem: Path, note: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5))
    if note:
        figure.supxlabel(note, fontsize=8, color="#B00000")
    for suffix in SUFFIXES:
        save(figure, stem.with_name(f"{stem.name}{suffix}"))
