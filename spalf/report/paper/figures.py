"""The manuscript's own figures, drawn at the width they are printed at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from spalf.report.figures import frontier_figure
from spalf.report.paper.comparisons import Change, Consistency
from spalf.report.paper.results import QUESTIONS, RANDOM, Result
from spalf.report.records import read_metrics
from spalf.report.style import (
    ABREAST,
    PAGE_WIDTH,
    RANDOM_LOOK,
    by_target,
    house_style,
    label_l0,
    legend_above,
    looks,
    octave_axis,
    plain_log_axis,
    save,
)

L0 = "L0 (features per token)"
Draw = Callable[[Axes, str], None]


def chunked(models: Sequence[str]) -> list[list[str]]:
    """As many models as fit side by side on a page, figure by figure."""
    return [list(models[i : i + ABREAST]) for i in range(0, len(models), ABREAST)]


def by_model(stem: Path, models: Sequence[str], label: str, draw: Draw, note: str) -> list[Path]:
    """A figure of one panel a model, or several figures where the page is too narrow for one.

    Args:
        stem: path without a suffix; of a second figure ``<stem>_2``.
        models: in order.
        label: of the vertical axis.
        draw: fills the panel of a model.
        note: what is missing.
    """
    written = []
    for index, some in enumerate(chunked(models)):
        with house_style():
            figure = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
            panels = figure.subplots(1, len(some), sharey=True, squeeze=False)[0]
            for axes, model in zip(panels, some, strict=True):
                draw(axes, model)
                axes.set_title(model)
            panels[0].set_ylabel(label)
            legend_above(figure, panels)
            name = f"{stem.name}_{index + 1}" if index else stem.name
            written += save(figure, stem.with_name(name), note)
    return written


def pareto_figure(table: pd.DataFrame, stem: Path, note: str) -> list[Path]:
    """ΔCE and explained variance against L0; methods only, no variants."""
    plain = table[table["variant"] == ""]
    written = []
    for index, some in enumerate(chunked(list(dict.fromkeys(plain["model"])))):
        name = f"{stem.name}_{index + 1}" if index else stem.name
        written += frontier_figure(plain[plain["model"].isin(some)], stem.with_name(name), note)
    return written


def course_figure(
    model: str, logs: Mapping[tuple[float, int], Sequence[Path]], stem: Path, note: str
) -> list[Path]:
    """L0, λ_faith and the violation of fidelity over training, one line a cell.

    Args:
        model: name of the model in the sweep.
        logs: metrics logs of both phases, by (L0_target, seed).
        stem: path without a suffix.
        note: what is missing.

    Raises:
        UserError: a log is damaged.
    """
    colours = by_target(target for target, _ in logs)
    panels_of = (
        ("l0", "L0 (features per token)"),
        ("lambda_faith", "λ of fidelity (no unit)"),
        ("g_faith", "violation of fidelity (no unit)"),
    )
    with house_style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.5), layout="constrained")
        panels = figure.subplots(1, len(panels_of))
        for (target, _), paths in sorted(logs.items()):
            log = pd.concat([read_metrics(path) for path in paths], ignore_index=True)
            for axes, (column, label) in zip(panels, panels_of, strict=True):
                look = {"color": colours[target], "linewidth": 0.9}
                axes.plot(log["tokens"] / 1e6, log[column], label=f"L0 target {target:g}", **look)
                axes.set_ylabel(label)
                axes.set_xlabel("tokens (millions)")
        for target, colour in colours.items():
            panels[0].axhline(target, color=colour, linestyle="--", linewidth=0.8)
        panels[0].set_yscale("log")
        octave_axis(panels[0].yaxis)
        panels[2].axhline(0, color="black", linewidth=0.6)
        panels[2].set_ylim(-0.5, 0.5)  # the controller saturates at 0.3 (M12)
        legend_above(figure, [panels[0]], title=model)
        return save(figure, stem, note)


def sweep_figure(results: Sequence[Result], stem: Path, note: str) -> list[Path]:
    """ΔCE against L0 as all thresholds of an SAE are scaled; SPALF's SAEs and random ones.

    A line is one SAE, its marker the SAE as trained.
    """
    own = [r for r in results if r.line in ("spalf", RANDOM) and r.data.get("threshold_sweep")]
    models = list(dict.fromkeys(str(r.cell["model"]) for r in own if r.line == "spalf"))
    colours = by_target(r.cell["L0_target"] for r in own)

    def draw(axes: Axes, model: str) -> None:
        axes.set_xscale("log")
        octave_axis(axes.xaxis)
        axes.set_xlabel(L0)
        shown = [r for r in own if r.cell["model"] == model]
        for result in shown:
            _sweep_line(axes, result, colours[result.cell["L0_target"]])
        trained = [p["l0"] for r in shown if r.line == "spalf" for p in r.data["threshold_sweep"]]
        low, high = min(x for x in trained if x > 0), max(trained)
        axes.set_xlim(0.7 * low, 1.4 * high)  # a random SAE's goes on for ever
        points = [p for r in shown for p in r.data["threshold_sweep"] if p["l0"] > 0]
        # A logarithm has no place for a ΔCE of zero or below; such a figure stays linear.
        if min(p["delta_ce"] for p in points) > 0:
            axes.set_yscale("log")
            plain_log_axis(axes.yaxis)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))

    return by_model(stem, models, "ΔCE (nats per token)", draw, note)


def _sweep_line(axes: Axes, result: Result, colour: Any) -> None:
    points = [p for p in result.data["threshold_sweep"] if p["l0"] > 0]
    x, y = [p["l0"] for p in points], [p["delta_ce"] for p in points]
    if result.line == RANDOM:
        axes.plot(x, y, color=RANDOM_LOOK["color"], linestyle=":", linewidth=1, label=RANDOM)
        return
    axes.plot(x, y, color=colour, label=f"L0 target {result.cell['L0_target']:g}")
    trained = [p for p in points if p["factor"] == 1]
    axes.plot([p["l0"] for p in trained], [p["delta_ce"] for p in trained], "o", color=colour)


def elasticity_figure(table: pd.DataFrame, stem: Path, note: str) -> list[Path]:
    """λ_faith at the end of Phase 1 against the slope of the frontier there; a point an SAE."""
    shown = table[table["line"] == "spalf"]
    if "slope" not in shown or "lambda_faith" not in shown:
        return []
    shown = shown.dropna(subset=["slope", "lambda_faith"])
    models = list(dict.fromkeys(shown["model"]))
    colours = by_target(shown["L0_target"])
    top = 1.1 * float(shown[["slope", "lambda_faith"]].to_numpy(float).max(initial=0.1))
    # Where the frontier is not monotone, as after a run that is too short, a slope is negative.
    low = 1.1 * float(shown["slope"].to_numpy(float).min(initial=0))

    def draw(axes: Axes, model: str) -> None:
        rows = shown[shown["model"] == model]
        axes.plot([0, top], [0, top], color="black", linewidth=0.8)
        axes.set_xlim(low, top)
        axes.set_ylim(-0.04 * top, top)  # a multiplier of zero must be seen
        for target, colour in colours.items():
            own = rows[rows["L0_target"] == target]
            label = f"L0 target {target:g}"
            axes.plot(own["slope"], own["lambda_faith"], "o", color=colour, label=label)
        axes.set_xlabel("−d log L0 / d log MSE (no unit)")

    return by_model(stem, models, "λ of fidelity (no unit)", draw, note)


def consistency_figure(
    found: Consistency, table: pd.DataFrame, stem: Path, note: str
) -> list[Path]:
    """PW-MCC against the L0 asked for; error bars one standard deviation over pairs of seeds."""
    plain = {(row.model, row.line) for row in table[table["variant"] == ""].itertuples()}
    shown = {key: score for key, score in found.items() if key[:2] in plain}
    styles = looks(line for _, line, _ in shown)

    def draw(axes: Axes, model: str) -> None:
        for line, look in styles.items():
            own = sorted(
                (t, score["pairs"]) for (m, n, t), score in shown.items() if (m, n) == (model, line)
            )
            if own:
                targets, pairs = [t for t, _ in own], [p for _, p in own]
                bars = [float(np.std(p, ddof=1)) if len(p) > 1 else 0.0 for p in pairs]
                means = [float(np.mean(p)) for p in pairs]
                axes.errorbar(targets, means, yerr=bars, **look, capsize=2, label=line)
        label_l0(axes, sorted({t for m, _, t in shown if m == model}))
        axes.set_xlabel("L0 asked (features per token)")
        axes.set_ylim(0, 1)

    models = list(dict.fromkeys(model for model, _, _ in shown))
    return by_model(stem, models, "PW-MCC (mean cosine)", draw, note)


def neighbour_figure(results: Sequence[Result], stem: Path, note: str) -> list[Path]:
    """How many features have their nearest neighbour at which cosine; SPALF's SAEs and random."""
    own = [
        r
        for r in results
        if r.line in ("spalf", RANDOM) and (r.data.get("decoder") or {}).get("nearest_histogram")
    ]
    colours = by_target(r.cell["L0_target"] for r in own)
    models = list(dict.fromkeys(str(r.cell["model"]) for r in own))

    def draw(axes: Axes, model: str) -> None:
        for result in (r for r in own if r.cell["model"] == model):
            counts = np.array(result.data["decoder"]["nearest_histogram"], dtype=float)
            edges = np.linspace(-1, 1, len(counts) + 1)
            look: dict[str, Any] = {"color": colours[result.cell["L0_target"]], "linewidth": 1.1}
            label = f"L0 target {result.cell['L0_target']:g}"
            if result.line == RANDOM:
                look, label = {"color": RANDOM_LOOK["color"], "linestyle": ":"}, RANDOM
            axes.stairs(counts / counts.sum(), edges, label=label, **look)
        axes.set_xlim(-0.1, 1)
        axes.set_xlabel("nearest cosine (no unit)")

    return by_model(stem, models, "features (share per 0.05)", draw, note)


def probing_figure(table: pd.DataFrame, stem: Path, note: str) -> list[Path]:
    """Balanced accuracy of probes of five features, by question; the mean over all L0 and seeds."""
    names = [f"probe_k5_{question}" for question in QUESTIONS]
    plain = table[table["variant"] == ""]
    if not set(names) <= set(plain):
        return []
    shown = plain.dropna(subset=names)
    models = list(dict.fromkeys(shown["model"]))
    styles = looks(shown["line"])

    def draw(axes: Axes, model: str) -> None:
        own = shown[shown["model"] == model]
        for index, (line, look) in enumerate(styles.items()):
            rows = own[own["line"] == line][names].astype(float)
            if len(rows):
                offset = 0.5 * ((index + 0.5) / len(styles) - 0.5)
                x = np.arange(len(names)) + offset
                low, high = rows.mean() - rows.min(), rows.max() - rows.mean()
                # Of equal values the mean may be a rounding below the least.
                low, high = low.clip(lower=0), high.clip(lower=0)
                style = {**look, "linestyle": "none"}
                axes.errorbar(x, rows.mean(), yerr=[low, high], **style, capsize=2, label=line)
        dense = [f"probe_all_{question}" for question in QUESTIONS]
        for index, name in enumerate(dense):
            ends = (index - 0.35, index + 0.35)
            top = own[name].astype(float).mean()
            axes.plot(ends, (top, top), color="black", linewidth=1, label="activations")
        axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(names)), list(QUESTIONS))
        axes.set_xlabel("question about a token")
        axes.grid(visible=False, axis="x")

    return by_model(stem, models, "balanced accuracy (share)", draw, note)


def variants_figure(
    compared: pd.DataFrame, found: Sequence[Change], stem: Path, note: str
) -> list[Path]:
    """ΔCE of variants over SPALF's own at the same L0; a row a variant, a point an SAE."""
    shown = compared.dropna(subset=["ratio"])
    names = [change.name for change in found if (shown["variant"] == change.name).any()]
    if not names:
        return []
    shown = shown[shown["variant"].isin(names)]
    models = list(dict.fromkeys(shown["model"]))
    colours = by_target(shown["L0_target"])
    written = []
    for index, some in enumerate(chunked(models)):
        with house_style():
            size = (PAGE_WIDTH, max(1.9, 1.1 + 0.19 * len(names)))
            figure = Figure(figsize=size, layout="constrained")
            panels = figure.subplots(1, len(some), sharey=True, squeeze=False)[0]
            for axes, model in zip(panels, some, strict=True):
                _variant_points(axes, shown[shown["model"] == model], names, colours)
                axes.set_title(model)
            panels[0].set_yticks(range(len(names)), names)
            panels[0].set_ylim(len(names) - 0.5, -0.5)
            panels[0].set_ylabel("variant")
            legend_above(figure, panels)
            name = f"{stem.name}_{index + 1}" if index else stem.name
            written += save(figure, stem.with_name(name), note)
    return written


def _variant_points(
    axes: Axes, rows: pd.DataFrame, names: Sequence[str], colours: Mapping[float, Any]
) -> None:
    for step, (target, colour) in enumerate(colours.items()):
        own = rows[rows["L0_target"] == target]
        places = np.array([names.index(variant) for variant in own["variant"]], dtype=float)
        y = places + 0.5 * ((step + 0.5) / len(colours) - 0.5)
        axes.plot(own["ratio"], y, "o", markersize=3, color=colour, label=f"L0 target {target:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    if rows["ratio"].max() > 4 * rows["ratio"].min():
        axes.set_xscale("log")
        plain_log_axis(axes.xaxis)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_xlabel("ΔCE over SPALF's (ratio)")
    axes.margins(x=0.08)


def rate_figure(
    table: pd.DataFrame, found: Sequence[Change], usual: float, stem: Path, note: str
) -> list[Path]:
    """ΔCE against the learning rate, one line an L0 target; error bars over seeds."""
    rates = {change.name: change.value for change in found if change.kind == "rate"}
    if not rates:
        return []
    shown = table[(table["line"] == "spalf") | table["variant"].isin(list(rates))]
    shown = shown.assign(rate=[rates.get(variant, usual) for variant in shown["variant"]])
    colours = by_target(shown["L0_target"])

    def draw(axes: Axes, model: str) -> None:
        own = shown[shown["model"] == model]
        for target, colour in colours.items():
            seeds = own[own["L0_target"] == target].groupby("rate")["delta_ce"]
            several = bool((seeds.size() > 1).any())
            look: dict[str, Any] = {"yerr": seeds.std(ddof=1)} if several else {}
            look |= {"color": colour, "marker": "o", "capsize": 2, "label": f"L0 target {target:g}"}
            axes.errorbar(seeds.mean().index, seeds.mean(), **look)
        axes.set_xscale("log")
        plain_log_axis(axes.xaxis)
        axes.set_xticks(sorted(shown["rate"].unique()))
        axes.tick_params(axis="x", labelrotation=45)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("peak learning rate (no unit)")

    return by_model(stem, list(dict.fromkeys(shown["model"])), "ΔCE (nats per token)", draw, note)
