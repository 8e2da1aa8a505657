"""``spalf describe``: the derived parameters of a run as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from spalf.config import RunConfig, SweepConfig, describe, parse, parse_sweep
from spalf.config.io import read_mapping
from spalf.errors import UserError


def description(source: Path, cell: str | None) -> str:
    """The table for a run's or sweep's configuration file, or for a step's directory.

    Raises:
        UserError: ``source`` is neither, or ``cell`` is not in the sweep.
    """
    title, rows = _from_directory(source) if source.is_dir() else _from_file(source, cell)
    body = [(row["name"], _number(row["value"]), row["formula"], row["source"]) for row in rows]
    table = tabulate(body, headers=("parameter", "value", "formula", "from"), disable_numparse=True)
    return f"{title}\n\n{table}"


def _from_directory(directory: Path) -> tuple[str, list[dict[str, Any]]]:
    try:
        metadata = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))
        return str(directory), metadata["derived"]
    except (OSError, ValueError, KeyError):
        remedy = "holds no run; give the directory of an init, phase1 or phase2 step"
        raise UserError("source", str(directory), remedy) from None


def _from_file(path: Path, cell: str | None) -> tuple[str, list[dict[str, Any]]]:
    title, config = _read(path, cell)
    return title, [row.__dict__ for row in describe(config)]


def run_of(path: Path, cell: str | None) -> RunConfig:
    """The configuration in a run's file, or that of one cell in a sweep's.

    Args:
        path: a YAML file.
        cell: as ``MODEL/L0_<target>/seed_<seed>``; by default the first of a sweep.

    Raises:
        UserError: the file is neither, or ``cell`` is not in the sweep.
    """
    return _read(path, cell)[1]


def _read(path: Path, cell: str | None) -> tuple[str, RunConfig]:
    data = read_mapping(path)
    if "models" not in data:
        return str(path), parse(RunConfig, data, str(path))
    name, config = _pick(parse_sweep(data, str(path)), cell)
    return f"{path}, {name}", config


def _pick(sweep: SweepConfig, wanted: str | None) -> tuple[str, RunConfig]:
    cells = {f"{c.model}/L0_{c.L0_target:g}/seed_{c.seed}": c for c in sweep.cells()}
    name = wanted or next(iter(cells))
    if name not in cells:
        raise UserError("--cell", name, f"is not in the sweep; cells are {', '.join(cells)}")
    return name, sweep.run_config(cells[name])


def _number(value: float | int | None) -> str:
    if value is None:
        return "(not yet measured)"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
