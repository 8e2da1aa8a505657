"""Orthogonality of the decoder columns that fire together (M8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spalf.kernels import Implementation, choose

SMALLEST_SQUARE = 1e-24
"""Square of a column's norm below which its cosines count as those of a column of that norm."""


def coactive_cosine_squared(
    columns: Tensor, active: Tensor, *, implementation: Implementation = "auto"
) -> Tensor:
    """Mean over tokens of the mean cos² between pairs of co-active decoder columns.

    A token with fewer than two active features has no pair and does not count.

    Args:
        columns: decoder columns of the features considered, ``[tokens, max_active, d_model]``.
        active: 1 where a feature is active, 0 elsewhere, ``[tokens, max_active]``.
        implementation: ``auto`` (see `spalf.kernels.choose`), ``triton`` or ``reference``.

    Returns:
        A scalar in [0, 1].
    """
    if choose(columns, implementation).implementation == "triton":
        # Imported late: machines without a GPU need no triton, and importing it is slow.
        from spalf.kernels.triton_coactive import TritonCoactive

        found: Tensor = TritonCoactive.apply(columns, active, SMALLEST_SQUARE)
        return found
    # Dividing the small matrix of products rather than the columns saves several passes over them.
    gram: Tensor = _Gram.apply(columns)
    squares = gram.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST_SQUARE)
    both_squares = squares.unsqueeze(1) * squares.unsqueeze(2)
    # A column of zeros, times itself, is too small for float32.
    cosine_squared = gram.square() / both_squares.clamp_min(torch.finfo(gram.dtype).tiny)
    both = active.unsqueeze(1) * active.unsqueeze(2)
    n_active = active.sum(dim=1)
    # The diagonal of an active column is 1, so it is taken off rather than masked out.
    off_diagonal = (cosine_squared * both).sum(dim=(1, 2)) - n_active
    pairs = n_active * (n_active - 1)
    per_token = off_diagonal / pairs.clamp_min(1.0)
    return (per_token * (pairs > 0)).sum() / (pairs > 0).sum().clamp_min(1)


class _Gram(torch.autograd.Function):
    """Products of all pairs of columns of each token, ``[tokens, n, n]``.

    The two halves of its gradient are one product here; autograd would make two and add up a
    transposed one.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor) -> Tensor:
        """``columns [tokens, n, d_model]``, times itself."""
        ctx.save_for_backward(columns)
        return torch.bmm(columns, columns.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gram: Tensor) -> Tensor:
        """(G + Gᵀ)·columns."""
        (columns,) = ctx.saved_tensors
        return torch.bmm(d_gram + d_gram.transpose(1, 2), columns)


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
