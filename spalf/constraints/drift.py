"""Anchor drift: how far the anchored columns have moved from their token directions (M8)."""

from __future__ import annotations

from torch import Tensor


def drift_violation(anchored: Tensor, anchors: Tensor, delta_drift: float) -> Tensor:
    """g_drift = ‖W_A − W_A⁰‖²_F / (δ²·‖W_A⁰‖²_F) − 1 (M8).

    Args:
        anchored: current anchored columns as rows, ``[n_anchored, d_model]``.
        anchors: their token directions, same shape.
        delta_drift: tolerated relative drift δ.

    Returns:
        A scalar; −1, the most feasible value, when nothing is anchored.
    """
    if anchors.shape[0] == 0:
        return anchored.sum() - 1.0
    allowed = delta_drift**2 * anchors.square().sum()
    return (anchored - anchors).square().sum() / allowed - 1.0
