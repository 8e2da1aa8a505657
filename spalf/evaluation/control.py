"""How well the controller did its work, from the metrics log of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

CONSTRAINTS = ("faith", "drift", "ortho")
SLOW_BETA = 0.99
"""Per-step decay of the slow average that L0 is judged by (M11)."""

Row = Mapping[str, Any]


def control_summary(rows: Sequence[Row], phase: int) -> dict[str, Any]:
    """Settling, ∫v² and final multipliers of one phase.

    Args:
        rows: the metrics log, one mapping per logged step, in order.
        phase: 1 or 2; rows of the other phase are ignored.

    Returns:
        ``settling_step`` (``None`` if it never settled), ``integral_v2`` and ``lambda_final``,
        both by constraint; ``None`` for a constraint that was not logged.
    """
    own = [row for row in rows if row["phase"] == phase]
    last = own[-1] if own else {}
    return {
        "settling_step": settling_step(own),
        "integral_v2": {name: integral_v2(own, name) for name in CONSTRAINTS},
        "lambda_final": {name: last.get(f"lambda_{name}") for name in CONSTRAINTS},
    }


def settling_step(
    rows: Sequence[Row], tolerance: float = 0.05, beta: float = SLOW_BETA
) -> int | None:
    """First step from which L0 stays at its target.

    That is: L0_ref has arrived at its last value, and from there on the bias-corrected EMA
    (decay ``beta`` per step) of l0/l0_ref stays within ``tolerance`` of 1.

    Args:
        rows: rows of one phase with ``step``, ``l0`` and ``l0_ref``, in order.
        tolerance: allowed relative deviation.
        beta: decay per step; rows further apart decay accordingly.

    Returns:
        The step, or ``None`` if L0 has not settled by the last row.
    """
    settled: int | None = None
    for row, ratio in zip(rows, _smoothed_ratios(rows, beta), strict=True):
        arrived = abs(row["l0_ref"] - rows[-1]["l0_ref"]) <= 1e-6 * abs(rows[-1]["l0_ref"])
        if not (arrived and abs(ratio - 1) <= tolerance):
            settled = None
        elif settled is None:
            settled = int(row["step"])
    return settled


def integral_v2(rows: Sequence[Row], constraint: str) -> float | None:
    """∫v² over steps of one constraint, by the trapezoidal rule between logged steps.

    v is the violation g where the constraint acts (g > 0 or λ > 0). A constraint that holds with
    a zero multiplier is where it should be, so its slack counts for nothing.

    Args:
        rows: rows of one phase with ``step``, ``g_<constraint>`` and ``lambda_<constraint>``.
        constraint: ``faith``, ``drift`` or ``ortho``.

    Returns:
        The integral in steps (violations have no unit), or ``None`` if it was not logged.
    """
    points = [
        (row["step"], _acting_violation(row, constraint) ** 2)
        for row in rows
        if row.get(f"g_{constraint}") is not None
    ]
    if not points:
        return None
    steps = pairwise(points)
    return float(sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in steps))


def _acting_violation(row: Row, constraint: str) -> float:
    violation = float(row[f"g_{constraint}"])
    acts = violation > 0 or (row.get(f"lambda_{constraint}") or 0.0) > 0
    return violation if acts else 0.0


def _smoothed_ratios(rows: Sequence[Row], beta: float) -> list[float]:
    """Bias-corrected EMA of l0/l0_ref, robust to uneven logging."""
    total, weight, smoothed = 0.0, 0.0, []
    before: int | None = None
    for row in rows:
        decay = beta ** (row["step"] - before) if before is not None else beta
        before = row["step"]
        total = decay * total + (1 - decay) * row["l0"] / row["l0_ref"]
        weight = decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed
