"""How the decoder directions of an SAE lie to each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR = (0.5, 0.7, 0.9)
"""Cosines above which a neighbour is counted as near."""

BINS = 40
"""Bins of the histogram over cosines from −1 to 1."""


@torch.no_grad()
def decoder_cosines(W_dec: Tensor, *, chunk: int = 1024) -> dict[str, Any]:
    """Cosine structure of a dictionary: nearest neighbours, and all pairs.

    Needs ``chunk × d_sae`` numbers at a time.

    Args:
        W_dec: ``[d_sae, d_model]``; columns need no particular norm.
        chunk: rows compared at a time.

    Returns:
        ``nearest_mean``, ``nearest_quantiles`` and ``nearest_histogram`` (counts in `BINS` equal
        bins from −1 to 1) of each feature's largest cosine with another one; ``near``: the share of
        features for which that is above 0.5, 0.7, 0.9; ``mean_square``: d_model times the mean
        cos² over pairs, 1 for isotropic directions. ``None`` for each with fewer than two features.
    """
    unit = F.normalize(W_dec.float(), dim=1)
    n, d_model = unit.shape
    if n < 2:
        names = ("nearest_mean", "nearest_quantiles", "nearest_histogram", "near", "mean_square")
        return dict.fromkeys(names)
    nearest, squares = [], 0.0
    for start in range(0, n, chunk):
        cosine = unit[start : start + chunk] @ unit.T
        own = torch.arange(start, start + cosine.shape[0], device=unit.device)
        cosine[own - start, own] = 0
        squares += float(cosine.double().square().sum())
        cosine[own - start, own] = -torch.inf
        nearest.append(cosine.amax(dim=1))
    largest = torch.cat(nearest).double().clamp(-1, 1).cpu()
    quantiles = torch.quantile(largest, torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "nearest_mean": float(largest.mean()),
        "nearest_quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        "nearest_histogram": torch.histc(largest, BINS, -1, 1).long().tolist(),
        "near": {str(limit): float((largest > limit).double().mean()) for limit in NEAR},
        "mean_square": d_model * squares / (n * (n - 1)),
    }
