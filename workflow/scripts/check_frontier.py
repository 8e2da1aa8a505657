"""Check the tables of a finished sweep against what the method promises.

Example: python -m workflow.scripts.check_frontier results/tables --cells 6
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

CELL = ["model", "hook_point", "method", "variant", "L0_target", "seed"]
L0_TOLERANCE = 0.05
DEAD_LIMIT = 0.10


def faults(frontier: pd.DataFrame, phases: pd.DataFrame) -> list[str]:
    """What is wrong with the tables, one sentence a fault; empty when all holds.

    Only of SPALF itself: a baseline may miss, a variant is there to show what goes wrong.
    """
    everything, frontier, phases = frontier, _ours(frontier), _ours(phases)
    return [
        *(f"{_name(row)}: L0 {row['l0']:.2f} and R² below target" for row in _off_target(frontier)),
        *(f"{_name(row)}: {row['dead_fraction']:.1%} dead" for row in _dead(frontier)),
        *_not_falling(frontier),
        *_phase2_worse(phases),
        *_no_better_than_chance(frontier, everything),
    ]


def _ours(table: pd.DataFrame) -> pd.DataFrame:
    variant = table["variant"].astype(object).fillna("")  # a column of blanks is read as numbers
    return table.assign(variant=variant)[(table["method"] == "spalf") & (variant == "")]


def _rows(table: pd.DataFrame) -> list[dict[str, float]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _name(row: dict[str, float]) -> str:
    return f"{row['model']} L0_{row['L0_target']:g} seed {row['seed']:g}"


def _off_target(table: pd.DataFrame) -> list[dict[str, float]]:
    hit = (table["l0"] / table["L0_target"] - 1).abs() <= L0_TOLERANCE
    return _rows(table[~(hit | (table["explained_variance"] >= table["R2_target"]))])


def _dead(table: pd.DataFrame) -> list[dict[str, float]]:
    return _rows(table[~(table["dead_fraction"] <= DEAD_LIMIT)])


def _not_falling(table: pd.DataFrame) -> list[str]:
    """ΔCE must fall as the L0 target grows, for each model, method and seed."""
    keys = [name for name in CELL if name != "L0_target"]
    return [
        f"{key[0]} seed {key[-1]}: ΔCE does not fall as L0_target grows"
        for key, rows in table.groupby(keys)
        if isinstance(key, tuple)
        and not (rows.sort_values("L0_target")["delta_ce"].diff().dropna() < 0).all()
    ]


def _phase2_worse(phases: pd.DataFrame) -> list[str]:
    wide = phases.pivot(index=CELL, columns="phase", values="delta_ce")
    if "phase2" not in wide:
        return ["phases.csv has no phase2"]
    return [
        f"{key[0]} L0_{key[4]:g} seed {key[5]}: Phase 2 did not lower ΔCE"
        for key, row in wide.iterrows()
        if isinstance(key, tuple) and not row["phase2"] < row["phase1"]
    ]


def _no_better_than_chance(ours: pd.DataFrame, everything: pd.DataFrame) -> list[str]:
    """A trained SAE must beat the random one of its model, L0 target and seed, if there is one."""
    keys = ["model", "hook_point", "L0_target", "seed"]
    random = everything[everything["method"] == "random"]
    pairs = ours.merge(random, on=keys, suffixes=("", "_random"))
    beaten = (pairs["delta_ce"] < pairs["delta_ce_random"]) & (
        pairs["explained_variance"] > pairs["explained_variance_random"]
    )
    return [f"{_name(row)}: no better than a random SAE" for row in _rows(pairs[~beaten])]


def lost_to_chance(numbers: dict[str, Any]) -> list[str]:
    """Every measure of the manuscript in which a trained SAE does not beat a random one."""
    sanity = numbers["sanity"]
    if sanity["total"] == "0":
        return ["numbers.json has no comparison with random SAEs"]
    return [f"{lost}: no better than a random SAE" for lost in sanity["lost"]]


def main() -> int:
    """Report every fault; the exit status is 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", type=Path, help="directory with frontier.csv and phases.csv")
    parser.add_argument("--cells", type=int, required=True, help="rows the frontier must have")
    parser.add_argument("--numbers", type=Path, help="numbers.json of the manuscript, if made")
    arguments = parser.parse_args()
    frontier = pd.read_csv(arguments.tables / "frontier.csv")
    found = faults(frontier, pd.read_csv(arguments.tables / "phases.csv"))
    if arguments.numbers:
        found += lost_to_chance(json.loads(arguments.numbers.read_text(encoding="utf-8")))
    if len(frontier) != arguments.cells:
        found.append(f"frontier.csv has {len(frontier)} rows, not {arguments.cells}")
    sys.stderr.writelines(f"{fault}\n" for fault in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
