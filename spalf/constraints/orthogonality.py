"""Orthogonality of the decoder columns that fire together (M8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def coactive_cosine_squared(z: Tensor, W_dec: Tensor, max_active: int) -> Tensor:
    """Mean over tokens of the mean cos² between pairs of co-active decoder columns.

    Gradient reaches ``W_dec`` only. A token with fewer than two active features has no pair and
    does not count.

    Args:
        z: codes of a subset of the batch, ``[tokens, d_sae]``.
        W_dec: decoder, ``[d_sae, d_model]``.
        max_active: features considered per token, the strongest first; bounds the cost.

    Returns:
        A scalar in [0, 1].
    """
    values, indices = z.detach().topk(max_active, dim=1)
    active = (values > 0).to(W_dec.dtype)
    columns = functional.normalize(W_dec, dim=1)[indices] * active.unsqueeze(-1)
    gram = torch.bmm(columns, columns.transpose(1, 2))
    n_active = active.sum(dim=1)
    # The diagonal of an active column is exactly 1, so it is taken off rather than masked out.
    off_diagonal = gram.square().sum(dim=(1, 2)) - n_active
    pairs = n_active * (n_active - 1)
    per_token = off_diagonal / pairs.clamp_min(1.0)
    return (per_token * (pairs > 0)).sum() / (pairs > 0).sum().clamp_min(1)


def orthogonality_violation(mean_cosine_squared: Tensor, d_model: int, c_ortho: float) -> Tensor:
    """g_ortho = (mean cos²)/(c/d) − 1; random directions have E cos² = 1/d (M8).

    Args:
        mean_cosine_squared: from `coactive_cosine_squared`.
        d_model: width of the activations.
        c_ortho: tolerance in units of 1/d.

    Returns:
        A scalar.
    """
    return mean_cosine_squared * (d_model / c_ortho) - 1.0
