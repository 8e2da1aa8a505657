"""The faithfulness metric that knows what the model will do with an error (M8)."""

from __future__ import annotations

import torch
from torch import Tensor

from spalf.errors import UserError

FISHER_SHARE = 0.5
"""Weight of the Fisher information in the metric; the rest is Euclidean.

Alone it costs more explained variance and lowers the cross-entropy no further."""


def fisher_factor(fisher: Tensor, covariance: Tensor) -> Tensor:
    """R such that ‖r R‖² = ½·‖r‖² + ½·c·rᵀGr, with c = tr Σ / tr GΣ (M8).

    With that c both terms give the activations the same variance, so the metric does too, and
    explained variance, τ and R2_target mean in it what they mean in the Euclidean one.

    Args:
        fisher: G, ``[d_model, d_model]``, symmetric.
        covariance: Σ of the activations, float64 ``[d_model, d_model]``, on the same device.

    Returns:
        float32 ``[d_model, d_model]``.

    Raises:
        UserError: the predictions do not depend on the activations.
    """
    fisher = fisher.to(covariance.dtype)
    explained = float((fisher * covariance).sum())
    if not explained > 0 or not torch.isfinite(fisher).all():
        remedy = "the predictions do not depend on the site, or overflow; use euclidean"
        raise UserError("method.metric", "fisher", remedy)
    identity = torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    scaled = fisher * (float(covariance.trace()) / explained)
    return torch.linalg.cholesky((1 - FISHER_SHARE) * identity + FISHER_SHARE * scaled).float()
