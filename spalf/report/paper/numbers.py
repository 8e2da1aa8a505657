"""The numbers in the manuscript's text, formatted, by where they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd

from spalf.config import SweepConfig
from spalf.report.paper.comparisons import Consistency, Sanity, geometric_mean
from spalf.report.paper.results import RANDOM, Result
from spalf.report.paper.sheet import NONE, extent, number

_SOFTWARE = ("commit", "device", "machine", "python")


def built(results: Sequence[Result], config: str) -> dict[str, Any]:
    """Configuration, commit, hardware and versions that the evaluations were made with."""
    environments = [result.data.get("environment", {}) for result in results]
    names = list(dict.fromkeys(name for environment in environments for name in environment))
    values = {
        name: ", ".join(dict.fromkeys(str(e[name]) for e in environments if e.get(name)))
        for name in names
    }
    packages = [[name, values[name]] for name in names if name not in _SOFTWARE and values[name]]
    packages += [["typst", version("typst")], ["matplotlib", version("matplotlib")]]
    found = {name: values.get(name) or "not recorded" for name in _SOFTWARE}
    return {**found, "config": config or "not recorded", "packages": packages}


def grid(sweep: SweepConfig) -> dict[str, Any]:
    """What was asked for, by model."""
    rows = []
    for name, entry in sweep.models.items():
        config = sweep.run_config(next(cell for cell in sweep.cells() if cell.model == name))
        sizes = (config.total_tokens, config.batch_size, config.evaluate.tokens)
        shown = (str(config.F), f"{config.lr:g}", *(f"{size:,}" for size in sizes))
        rows.append([name, entry.model_name, entry.hook_point, *shown])
    return {
        "models": rows,
        "dataset": sweep.dataset.path,
        "L0_target": [f"{target:g}" for target in sweep.grid.L0_target],
        "seed": [str(seed) for seed in sweep.grid.seed],
        "methods": list(dict.fromkeys(sweep.methods)),
        "variants": str(len(sweep.variants)),
        "R2_target": f"{sweep.train.R2_target:g}",
        "constants": {k: f"{v:g}" for k, v in sweep.constants.model_dump().items()},
    }


def counts(
    sweep: SweepConfig, table: pd.DataFrame, expected: int, missing: Sequence[str]
) -> dict[str, Any]:
    """How much of the grid there is."""
    return {
        "expected": str(expected),
        "found": str(expected - len(missing)),
        "missing": list(missing),
        "models": str(len(sweep.models)),
        "saes": str(len(table)),
        "seeds": str(table["seed"].nunique()),
    }


def abstract(
    table: pd.DataFrame, compared: pd.DataFrame, consistency: Consistency
) -> dict[str, Any]:
    """The figures of the abstract, over SPALF's own SAEs; a dash where there are none."""
    ours = table[table["line"] == "spalf"]
    found = {
        "saes": str(len(ours)),
        "l0_within": _largest(ours, "l0_error", ".1%"),
        "ev": _extent(ours, "explained_variance"),
        "ce_recovered": _extent(ours, "ce_recovered", ".1%"),
        "dead": _largest(ours, "dead_fraction", ".1%"),
        "phase2": _extent(ours, "phase2_ratio"),
        "lambda": _extent(ours, "lambda_faith"),
        "elasticity": NONE,
    }
    if {"lambda_faith", "slope"} <= set(ours):
        ratio = (ours["lambda_faith"] / ours["slope"]).dropna()
        found["elasticity"] = extent(ratio)
    plain = compared[compared["variant"] == ""]
    baselines = [
        {"name": str(line), "ratio": number(geometric_mean(known), ".2f")}
        for line, rows in plain.groupby("line", sort=False)
        if len(known := rows["ratio"].dropna())
    ]
    seeds = {
        line: extent(
            [score["pw_mcc"] for (_, name, _), score in consistency.items() if name == line]
        )
        for line in ("spalf", RANDOM)
    }
    return {**found, "baselines": baselines, "consistency": seeds}


def sanity(found: Sanity) -> dict[str, Any]:
    """How many of the comparisons with random SAEs were won, and which were not."""
    return {"won": str(found.won), "total": str(found.total), "lost": list(found.lost)}


def probing(table: pd.DataFrame) -> Mapping[str, str]:
    """Mean balanced accuracy over questions: SPALF's features, random ones, the activations."""
    names = {"spalf": ("spalf", "probe_k5"), "random": (RANDOM, "probe_k5")}
    names["all"] = ("spalf", "probe_all")
    return {
        name: _extent(table[table["line"] == line], column)
        for name, (line, column) in names.items()
    }


def _extent(rows: pd.DataFrame, name: str, form: str = ".2f") -> str:
    return extent(rows[name], form) if name in rows else NONE


def _largest(rows: pd.DataFrame, name: str, form: str) -> str:
    known = rows[name].astype(float).abs().dropna() if name in rows else pd.Series(dtype=float)
    return number(float(known.max()), form) if len(known) else NONE
