"""The measurements as JSON, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from tabulate import tabulate

COLUMNS = ["what", "axis", "d_model", "F", "L0", "batch", "ms", "tokens_per_s", "peak_gib", "l0"]


def write_report(out: Path, hardware: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what is measured so far; what follows overwrites it."""
    text = json.dumps({"hardware": hardware, "rows": list(rows)}, indent=1)
    (out / "bench.json").write_text(text + "\n", encoding="utf-8")
    timed = [row for row in rows if "ms" in row and row["axis"] != "end to end"]
    if not timed:
        return
    table = pd.DataFrame(timed)[COLUMNS]
    table["ratio"] = [_ratio(row, timed) for row in timed]
    heading = ", ".join(f"{name} {value}" for name, value in hardware.items())
    lines = [heading, "", _markdown(table)]
    lines += [
        f"Ceilings: product {row['product_ms']:.3f} ms, copy {row['copy_bytes_per_s'] / 1e12:.2f} "
        f"TB/s; floor of a step {row['floor_ms']:.2f} ms, and {row['entries_ms']:.2f} ms for the "
        "rows of active entries."
        for row in rows
        if row["what"] == "ceilings"
    ]
    lines += _floor_reached(rows) + _end_to_end(rows)
    (out / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(table, heading).savefig(out / "bench.png", dpi=150, metadata={"Software": None})


def _floor_reached(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    floors = [row for row in rows if row["what"] == "ceilings"]
    steps = [row["ms"] for row in rows if row["what"] == "spalf" and row["axis"] == "main"]
    if not floors or not steps:
        return []
    bare, entries = floors[0]["floor_ms"], floors[0]["entries_ms"]
    return [
        f"SPALF's step is at {bare / steps[0]:.2f} of the floor; at "
        f"{(bare + entries) / steps[0]:.2f} with the rows of active entries counted."
    ]


def _end_to_end(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """With the language model in the loop: a table, and what follows from it."""
    found = [row for row in rows if row.get("axis") == "end to end"]
    if not found:
        return []
    shape = found[0]
    head = (
        f"With the language model in the loop (d {shape['d_model']}, F {shape['F']}, "
        f"L0 {shape['L0']}, batch {shape['batch']}):"
    )
    table = pd.DataFrame(found).reindex(columns=["what", "cells", "overlap", "ms", "tokens_per_s"])
    for name, digits in (("ms", 2), ("tokens_per_s", 0)):
        table[name] = [f"{value:,.{digits}f}" for value in table[name]]
    table = table.fillna({"cells": "", "overlap": ""})
    return ["", head, "", _rows(table), *_conclusions(found)]


def _conclusions(found: Sequence[Mapping[str, Any]]) -> list[str]:
    def best(what: str, cells: int) -> float:
        return min(
            (r["ms"] for r in found if (r["what"], r.get("cells")) == (what, cells)), default=0
        )

    one, five, theirs = best("spalf", 1), best("spalf", 5), best("saelens jumprelu", 1)
    lines = []
    if one and theirs:
        lines.append(f"SAELens's runner takes {theirs / one:.2f} times as long as one cell.")
    if one and five:
        lines.append(f"Five packed cells take {five / one:.2f} times as long as one.")
    return lines


def _ratio(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Time of the fastest other contestant of SPALF at this shape, over this one's."""
    same = ("d_model", "F", "L0", "batch")
    spalf = [
        other["ms"]
        for other in rows
        if other["what"] == "spalf" and all(other[key] == row[key] for key in same)
    ]
    return float(row["ms"] / min(spalf)) if spalf else float("nan")


def _markdown(table: pd.DataFrame) -> str:
    shown = table.copy()
    for name, digits in (("ms", 3), ("peak_gib", 2), ("l0", 1), ("ratio", 2)):
        shown[name] = [f"{value:.{digits}f}" for value in shown[name]]
    shown["tokens_per_s"] = [f"{value:,.0f}" for value in shown["tokens_per_s"]]
    return _rows(shown)


def _rows(table: pd.DataFrame) -> str:
    columns = list(map(str, table.columns))
    return tabulate(table.values.tolist(), columns, "github", disable_numparse=True) + "\n"


def _plot(table: pd.DataFrame, heading: str) -> Figure:
    axes_names = [name for name in ("F", "d_model", "L0", "batch") if (table.axis == name).any()]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.2 * max(1, len(axes_names)), 3.2), layout="constrained")
        for index, name in enumerate(axes_names or ["cpu"]):
            axes = figure.add_subplot(1, max(1, len(axes_names)), index + 1)
            if name == "cpu":
                shown = table[table.axis.isin(["cpu", "main"])]
                axes.barh(shown.what, shown.ms)
                axes.set_xlabel("ms a step")
                continue
            shown = table[table.axis.isin([name, "main"])]
            for what in ("spalf", "saelens jumprelu autocast"):
                line = shown[shown.what == what].sort_values(name)
                axes.plot(line[name], line.ms, marker="o", label=what)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            for scale in (axes.xaxis, axes.yaxis):
                scale.set_major_formatter(ScalarFormatter())
            axes.set_xticks(sorted(set(shown[name])))
            axes.tick_params(axis="x", labelrotation=45)
            axes.set_xlabel(name)
            axes.set_ylabel("ms a step")
        if axes_names:
            lines, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(lines, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.text(0.5, 0, heading, fontsize=7, ha="center", va="bottom")
    return figure
