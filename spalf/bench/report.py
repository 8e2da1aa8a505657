"""The measurements as JSON, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

COLUMNS = ["what", "axis", "d_model", "F", "L0", "batch", "ms", "tokens_per_s", "peak_gib", "l0"]


def write_report(out: Path, hardware: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what is measured so far; what follows overwrites it."""
    text = json.dumps({"hardware": hardware, "rows": list(rows)}, indent=1)
    (out / "bench.json").write_text(text + "\n", encoding="utf-8")
    timed = [row for row in rows if "ms" in row]
    if not timed:
        return
    table = pd.DataFrame(timed)[COLUMNS]
    table["ratio"] = [_ratio(row, timed) for row in timed]
    heading = ", ".join(f"{name} {value}" for name, value in hardware.items())
    lines = [heading, "", _markdown(table)]
    lines += [
        f"Ceilings: product {row['product_ms']:.3f} ms, copy {row['copy_bytes_per_s'] / 1e12:.2f} "
        f"TB/s; floor of a step {row['floor_ms']:.2f} ms."
        for row in rows
        if row["what"] == "ceilings"
    ]
    (out / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(table, heading).savefig(out / "bench.png", dpi=150, metadata={"Software": None})


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
    header = "| " + " | ".join(shown.columns) + " |\n|" + "---|" * len(shown.columns) + "\n"
    body = "\n".join("| " + " | ".join(str(v) for v in row) + " |" for row in shown.values)
    return header + body + "\n"


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
            axes.set_yscale("log")
            axes.set_xlabel(name)
            axes.set_ylabel("ms a step")
            axes.legend(frameon=False)
        figure.suptitle(heading, fontsize=7)
    return figure
