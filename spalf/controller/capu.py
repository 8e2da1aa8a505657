"""Conditionally adaptive penalty updates, non-monotone (M13; CAPU, arXiv 2508.15695)."""

from __future__ import annotations

from torch import Tensor

RHO_MIN, RHO_MAX = 0.1, 1.0
_EPSILON = 1e-8


def penalties(mean_square: Tensor, first: Tensor, c_eta: float) -> Tensor:
    """ρ_i = clip(η_i/√(v̄_i + ε), ρ_min, ρ_max), η_i = c_η/√(|v_i,0| + ε) (M13).

    A constraint that is far from its bound gets a small penalty, one that is close a large one,
    so the penalty term neither swamps the objective early nor fades late.

    Args:
        mean_square: v̄, slow average of v², ``[n]``.
        first: v_0, the violation at the first step, ``[n]``.
        c_eta: scale of the coefficients.

    Returns:
        ``[n]``.
    """
    eta = c_eta / (first.abs() + _EPSILON).sqrt()
    return (eta / (mean_square + _EPSILON).sqrt()).clamp(RHO_MIN, RHO_MAX)
