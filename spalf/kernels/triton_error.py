"""The error of a reconstruction in a metric, and its gradient, in Triton (M8).

Plain PyTorch passes over the batch some fifteen times between the reconstruction and its gradient;
here one pass makes the residual and its square, and one the square of its product with the factor
of the metric. All of the gradient but its slope, a number that depends on the error of the whole
batch, is there before that number is. Every sum has a fixed order.

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

COLUMNS = 1024
"""Columns a program handles at a time."""


@triton.jit
def _residual_kernel(
    x_ptr, x_hat_ptr, residual_ptr, square_ptr, inverse_scale, width, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < width
        x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
        x_hat = tl.load(x_hat_ptr + row * width + columns, mask=inside, other=0.0)
        residual = x * inverse_scale - x_hat
        total += residual * residual
        kept = residual.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * width + columns, kept, mask=inside)
    tl.store(square_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _square_kernel(value_ptr, square_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        value = tl.load(value_ptr + row * width + columns, mask=columns < width, other=0.0)
        total += value.to(tl.float32) * value.to(tl.float32)
    tl.store(square_ptr + row, tl.sum(total, axis=0))


class TritonErrors(torch.autograd.Function):
    """(x̂, x, scale, factor, dtype) → (error, mse); see `spalf.kernels.squared_errors`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Tensor,
        x: Tensor,
        scale: float,
        factor: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Keeps the gradient of x̂ for a slope of 1."""
        rows, width = x_hat.shape
        residual = torch.empty(rows, width, dtype=dtype, device=x_hat.device)
        squares = torch.empty(2, rows, device=x_hat.device)
        columns = min(COLUMNS, triton.next_power_of_2(width))
        _residual_kernel[(rows,)](
            x.contiguous(), x_hat.contiguous(), residual, squares[0], 1 / scale, width,
            COLUMNS=columns,
        )  # fmt: skip
        direction = residual
        if factor is None:
            squares[1].copy_(squares[0])
        else:
            operand = factor.to(dtype)
            product = residual @ operand
            if ctx.needs_input_grad[0]:
                direction = _product(product, operand.T)
            _square_kernel[(rows,)](product, squares[1], width, COLUMNS=columns)
        ctx.save_for_backward(direction)
        mse, error = squares.mean(dim=1)
        ctx.mark_non_differentiable(mse)
        return error, mse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_error: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x̂, float32."""
        (direction,) = ctx.saved_tensors
        slope = d_error * (-2.0 / len(direction))
        # A scalar does not make bfloat16 float32.
        return direction.float() * slope, None, None, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, in float32 where the device can."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
