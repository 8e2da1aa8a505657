"""The cells of a sweep as a table: what became of each, how far it is, and where its log is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from spalf.config import SweepConfig
from spalf.report.status import StepStatus, sweep_status

COLUMNS = ("cell", "state", "at", "progress", "ETA", "L0", "R²", "log")
ORDER = ("stopped", "running", "pending")
"""What a cell is, where its steps differ: the first of these that one of them is."""


def describe_status(results: Path, sweep: SweepConfig | None = None) -> str:
    """Counts by state, the grid as a table, then job, reason and logs of each stopped step.

    Args:
        results: directory of the results.
        sweep: lists also the cells that were not started.
    """
    everything = sweep_status(results)
    if not everything and sweep is None:
        return f"nothing was started under {results}"
    rows = [_row(steps) for steps in _by_cell(everything)]
    rows += [(name, "not started") for name in _not_started(sweep, everything)]
    states = [status.state for status in everything]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    table = tabulate(rows, COLUMNS, disable_numparse=True)
    stopped = [status.describe() for status in everything if status.state == "stopped"]
    return "\n\n".join(part for part in (f"steps: {counts or 'none'}", table, *stopped) if part)


def _by_cell(everything: Iterable[StepStatus]) -> list[list[StepStatus]]:
    cells: dict[str, list[StepStatus]] = {}
    for status in everything:
        cells.setdefault(status.cell, []).append(status)
    return list(cells.values())


def _not_started(sweep: SweepConfig | None, everything: Sequence[StepStatus]) -> list[str]:
    if sweep is None:
        return []
    started = {status.cell for status in everything}
    names = (
        cell.place.replace("/L0_", " L0_").replace("/seed_", " seed_") for cell in sweep.cells()
    )
    return [name for name in names if name not in started]


def _row(steps: Sequence[StepStatus]) -> tuple[str, ...]:
    """A cell's row; what counts is the step that stopped or runs, or else the last one done."""
    open_steps = [step for step in steps if step.state != "done"]
    open_steps.sort(key=lambda step: ORDER.index(step.state) if step.state in ORDER else len(ORDER))
    current = open_steps[0] if open_steps else steps[-1]
    finishing = ("calibrate", "pack", "evaluate", "dashboard")
    finished = current.state == "done" and current.step in finishing
    state = "waiting" if current.state == "done" and not finished else current.state
    log = str(current.logs[0]) if current.logs else ""
    where = "" if finished else f"after {current.step}" if state == "waiting" else current.step
    progress = current.progress
    if finished or progress is None:
        return (current.cell, state, where, "", "", *_measured(current.folder), log)
    is_open = current.state != "done"
    done = f"{progress.done}/{progress.total}" if is_open else ""
    left = progress.remaining if state == "running" else ""
    l0, r2 = (progress.shown.get(name, "") for name in ("L0", "R2"))
    return (current.cell, state, where, done, left, l0, r2, log)


def _measured(folder: Path) -> tuple[str, str]:
    """L0 and explained variance on held-out tokens, once they were measured."""
    try:
        found: Any = json.loads((folder / "evaluation.json").read_text("utf-8"))
        result = found["phases"][found["final"]]
        return f"{result['l0']:.3g}", f"{result['explained_variance']:.3g}"
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""
