"""How far the anchored columns have moved from their tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def anchor_drift(W_dec: Tensor, directions: Tensor) -> dict[str, float | int | None]:
    """Cosine of each anchored decoder column with its token direction.

    Args:
        W_dec: ``[d_sae, d_model]``, the anchored stratum first.
        directions: W_A⁰ ``[n_anchored, d_model]``, the token directions at initialisation (M3).

    Returns:
        ``mean_cosine`` and ``min_cosine`` (``None`` without anchors), ``n_anchored``.

    Raises:
        ValueError: more directions than columns.
    """
    n_anchored = directions.shape[0]
    if n_anchored > W_dec.shape[0]:
        raise ValueError(f"{n_anchored} token directions for {W_dec.shape[0]} decoder columns")
    if n_anchored == 0:
        return {"mean_cosine": None, "min_cosine": None, "n_anchored": 0}
    columns, targets = W_dec[:n_anchored].double(), directions.to(W_dec.device).double()
    cosine = F.cosine_similarity(columns, targets, dim=1)
    return {
        "mean_cosine": float(cosine.mean()),
        "min_cosine": float(cosine.min()),
        "n_anchored": n_anchored,
    }
