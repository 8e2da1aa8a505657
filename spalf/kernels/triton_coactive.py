"""How aligned the decoder columns are that fire together, and its gradient, in Triton (M8).

Plain PyTorch takes some fifty small kernels for it, there and back, one after another. Here one
goes through the products of each token's columns and leaves both its share of the mean and the
derivative of that by the products. All of the gradient but its slope is there before the multiplier
that the slope hangs on is asked for. Every sum has a fixed order.

Importing this module imports triton. With ``TRITON_INTERPRET=1`` set before that, the same kernels
run on CPU tensors.
"""

# mypy: allow-untyped-decorators, disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096
"""Products a program handles."""


@triton.jit
def _coactive_kernel(
    gram_ptr,  # products of the columns of each token, [tokens, n, n]
    active_ptr,  # 1 where a feature is active, else 0, [tokens, n]
    share_ptr,  # of each row of products in the token's mean, [tokens, n]
    slope_ptr,  # twice its derivative by each product, [tokens, n, n]
    paired_ptr,  # 1 where a token has a pair, else 0, [tokens]
    n,
    smallest,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    gram_ptr += token * n * n
    active_ptr += token * n
    row_active = tl.load(active_ptr + rows, mask=rows < n, other=0.0)
    column_active = tl.load(active_ptr + columns, mask=columns < n, other=0.0)
    n_active = tl.sum(column_active, axis=0)
    pairs = n_active * (n_active - 1.0)
    weight = tl.where(pairs > 0.0, 1.0 / tl.maximum(pairs, 1.0), 0.0)
    square = tl.load(gram_ptr + rows * (n + 1), mask=rows < n, other=1.0)
    row_square = tl.maximum(square, smallest)
    column_square = tl.load(gram_ptr + columns * (n + 1), mask=columns < n, other=1.0)
    column_square = tl.maximum(column_square, smallest)
    at = rows[:, None] * n + columns[None, :]
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    gram = tl.load(gram_ptr + at, mask=inside, other=0.0)
    # Divided by one square after the other: the product of two could be too small for float32.
    scaled = gram / row_square[:, None] * row_active[:, None]
    scaled = scaled / column_square[None, :] * column_active[None, :]
    total = tl.sum(scaled * gram, axis=1)
    # The diagonal of an active column is 1, so it is taken off rather than masked out.
    tl.store(share_ptr + token * n + rows, (total - row_active) * weight, mask=rows < n)
    slope = 4.0 * weight * scaled
    # A diagonal entry is also the square that its row and its column are divided by.
    back = tl.where(square >= smallest, 4.0 * weight * total / row_square, 0.0)
    slope -= tl.where(rows[:, None] == columns[None, :], back[:, None], 0.0)
    tl.store(slope_ptr + token * n * n + at, slope, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(paired_ptr + token, tl.where(pairs > 0.0, 1.0, 0.0))


class TritonCoactive(torch.autograd.Function):
    """(columns, active, smallest) → mean cos²; see `spalf.constraints.coactive_cosine_squared`."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, active: Tensor, smallest: float) -> Tensor:
        """Keeps the gradient of ``columns`` for a slope of 1."""
        tokens, n, _ = columns.shape
        gram = torch.bmm(columns, columns.transpose(1, 2))
        share, slope = torch.empty_like(gram[:, 0]), torch.empty_like(gram)
        paired = torch.empty(tokens, device=gram.device)
        width = triton.next_power_of_2(n)
        rows = min(width, max(1, TILE // width))
        _coactive_kernel[(tokens, triton.cdiv(n, rows))](
            gram, active.contiguous(), share, slope, paired, n, smallest, ROWS=rows, COLUMNS=width
        )
        pairs = paired.sum().clamp_min(1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.bmm(slope, columns), pairs)
        return share.sum() / pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor, None, None]:
        """Of ``columns``."""
        direction, pairs = ctx.saved_tensors
        return direction * (d_mean / pairs), None, None
