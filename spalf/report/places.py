"""Where the files of a sweep's cells lie."""

from __future__ import annotations

from pathlib import Path

from spalf.config import SweepConfig


def evaluations_of(sweep: SweepConfig, results: Path) -> list[Path]:
    """``evaluation.json`` of every cell, there or not, and of each imported SAE that has one."""
    own = [results / cell.place / "evaluation.json" for cell in sweep.cells()]
    imported = [
        path
        for model in sweep.models
        for path in sorted((results / model / "imported").glob("*/evaluation.json"))
    ]
    return own + imported


def metrics_of(sweep: SweepConfig, results: Path) -> dict[str, list[Path]]:
    """``metrics.jsonl`` of both phases of every cell, by model; without baselines and variants."""
    found: dict[str, list[Path]] = {}
    for cell in sweep.cells():
        if cell.series == cell.model:
            logs = (
                results / cell.place / phase / "metrics.jsonl" for phase in ("phase1", "phase2")
            )
            found.setdefault(cell.model, []).extend(logs)
    return found
