"""What the page says of the SAE as a whole: key figures, frontier, histograms, control traces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TRACE_ROWS = 1500
"""Rows of the metrics log that are drawn; of a longer one every n-th."""

TRACES = (
    *("l0", "l0_ref", "explained_variance", "log_tau", "dead_fraction"),
    *(f"{kind}_{name}" for kind in ("lambda", "rho", "g") for name in ("faith", "drift", "ortho")),
)
"""Columns of the metrics log that are drawn."""

THRESHOLD_BINS = 40
DECADE_BINS = 10
"""Bins of the density histogram in each factor of ten."""

_SWEEP_COLUMNS = ("factor", "l0", "explained_variance", "delta_ce")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class OverviewInputs:
    """Where the overview comes from, besides the features.

    Attributes:
        cell: ``model``, ``model_name``, ``hook_point``, ``method``, ``L0_target``, ``seed`` of the
            SAE, and its ``variant``, empty for none.
        phase: the training phase it is the result of.
        metrics: its measurements on held-out tokens (``evaluation.json``); empty if not known.
        sweep: the same SAE with its thresholds scaled, a row per factor.
        frontier: the SAEs of the same model and site, a row each.
        log: rows of the metrics log, all phases, in order.
    """

    cell: Row
    phase: str
    metrics: Row = field(default_factory=dict)
    sweep: Sequence[Row] = ()
    frontier: Sequence[Row] = ()
    log: Sequence[Row] = ()


def overview(
    inputs: OverviewInputs,
    fired: NDArray[np.int64],
    threshold: NDArray[np.float32],
    n_anchored: int,
    tokens: int,
) -> dict[str, Any]:
    """The overview as JSON.

    Args:
        inputs: what was measured and logged.
        fired: tokens on which each feature is active, ``[d_sae]``.
        threshold: θ, ``[d_sae]``; not a number for an SAE that has none.
        n_anchored: how many features, the first ones, are anchored.
        tokens: held-out tokens seen.
    """
    return {
        "cell": dict(inputs.cell),
        "phase": inputs.phase,
        "tokens": tokens,
        "features": len(fired),
        "anchored": n_anchored,
        "facts": _facts(inputs, fired, n_anchored, tokens),
        "frontier": [_frontier_row(row, inputs.cell) for row in inputs.frontier],
        "sweep": [{name: row[name] for name in _SWEEP_COLUMNS} for row in inputs.sweep],
        "density": _density_histogram(fired, n_anchored, tokens),
        "threshold": _threshold_histogram(threshold, n_anchored),
        "traces": _traces(inputs.log),
    }


def significant(value: float, digits: int = 4) -> float | None:
    """``value`` with that many significant digits; ``None`` where it is not a number."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _facts(
    inputs: OverviewInputs, fired: NDArray[np.int64], n_anchored: int, tokens: int
) -> list[tuple[str, str]]:
    """Names and values of the key figures, in reading order."""
    found, metrics = float(fired.sum() / tokens), inputs.metrics
    facts = [
        ("L0 asked", f"{inputs.cell['L0_target']:g}"),
        ("L0", f"{metrics.get('l0', found):.2f}"),
    ]
    formats = {
        "explained_variance": ("Explained variance", "{:.3f}"),
        "delta_ce": ("ΔCE (nats)", "{:.3f}"),
        "ce_recovered": ("CE recovered", "{:.1%}"),
        "kl": ("KL (nats)", "{:.3f}"),
    }
    for key, (name, form) in formats.items():
        if metrics.get(key) is not None:
            facts.append((name, form.format(metrics[key]).replace("%", " %")))
    dead = int((fired == 0).sum())
    facts.append(("Features", f"{len(fired):,}"))
    if n_anchored:
        facts.append(("of them anchored", f"{n_anchored:,}"))
    facts.append(("silent here", f"{dead:,} ({100 * dead / len(fired):.1f} %)"))
    facts.append(("Held-out tokens", f"{tokens:,}"))
    return facts


def _frontier_row(row: Row, cell: Row) -> dict[str, Any]:
    same = all(row[name] == cell[name] for name in ("method", "variant", "L0_target", "seed"))
    values = {name: row[name] for name in ("L0_target", "seed")}
    values["method"] = f"{row['method']} {row['variant']}".strip()
    values |= {name: _number(row[name]) for name in ("l0", "explained_variance", "delta_ce")}
    return values | {"own": bool(same)}


def _density_histogram(
    fired: NDArray[np.int64], n_anchored: int, tokens: int
) -> dict[str, list[float]]:
    """Features by log₁₀ of their density; silent ones have no place in it."""
    lowest = math.floor(-math.log10(tokens))
    edges = np.linspace(lowest, 0, DECADE_BINS * -lowest + 1)
    with np.errstate(divide="ignore"):
        density = np.log10(fired / tokens)
    return _histogram(density, np.isfinite(density), n_anchored, edges)


def _threshold_histogram(
    threshold: NDArray[np.float32], n_anchored: int
) -> dict[str, list[float]] | None:
    """Features by their threshold; ``None`` for an SAE that has none."""
    finite = np.isfinite(threshold)
    if not finite.any():
        return None
    top = float(threshold[finite].max(initial=1e-6))
    edges = np.linspace(0, top * (1 + 1e-6), THRESHOLD_BINS + 1)
    return _histogram(threshold, finite, n_anchored, edges)


def _histogram(
    values: NDArray[Any], counted: NDArray[np.bool_], n_anchored: int, edges: NDArray[Any]
) -> dict[str, list[float]]:
    anchored = np.arange(len(values)) < n_anchored
    return {
        "edges": [round(float(edge), 6) for edge in edges],
        "anchored": np.histogram(values[counted & anchored], edges)[0].tolist(),
        "free": np.histogram(values[counted & ~anchored], edges)[0].tolist(),
    }


def _traces(log: Sequence[Row]) -> dict[str, Any]:
    """Columns of the log, thinned; ``phase2`` is the number of tokens at which Phase 2 begins."""
    every = max(1, -(-len(log) // MAX_TRACE_ROWS))
    rows = [row for i, row in enumerate(log) if i % every == 0 or i == len(log) - 1]
    second = [row["tokens"] for row in log if row["phase"] == 2]
    return {
        "every": every,
        "tokens": [row["tokens"] for row in rows],
        "phase2": second[0] if second and len(second) < len(log) else None,
        **{name: [_number(row.get(name)) for row in rows] for name in TRACES},
    }


def _number(value: Any) -> float | None:
    return None if value is None else significant(float(value), 5)
