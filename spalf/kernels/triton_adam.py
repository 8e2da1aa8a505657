"""Adam for matrices whose rows may live on the unit sphere, in one pass over memory, in Triton.

A plain implementation projects the gradient, clips it, steps Adam and puts the rows back on the
sphere in some twenty passes over matrices of d_sae × d_model. Here one kernel reads gradient and
weights for the norm, and one does everything else while a row is in registers.

Importing this module imports triton. With ``TRITON_INTERPRET=1`` set before that, the same kernels
run on CPU tensors.
"""

# mypy: allow-untyped-decorators, disable-error-code=no-untyped-def
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_ROW = 1024
"""Elements of a vector parameter that count as a row."""


class AdamScalars(NamedTuple):
    """What one step has in common for all parameters; scalars on the device.

    Attributes:
        rate: lr/(1 − β1ᵗ), float32.
        root: 1/√(1 − β2ᵗ), float32.
        clip: factor on the gradients, float32.
        frozen: not 0 where the step must change nothing, float32.
    """

    rate: Tensor
    root: Tensor
    clip: Tensor
    frozen: Tensor


@triton.jit
def _square_norm_kernel(
    grad_ptr,
    weight_ptr,
    out_ptr,
    width,
    n_elements,
    sphere_from,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    offsets = row.to(tl.int64) * width + columns
    inside = (columns < width) & (offsets < n_elements)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
    if row >= sphere_from:
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        grad -= tl.sum(grad * weight, axis=0) * weight
    tl.store(out_ptr + row, tl.sum(grad * grad, axis=0))


@triton.jit
def _adam_kernel(
    grad_ptr,
    weight_ptr,
    copy_ptr,  # of the weight, in another type
    mean_ptr,
    square_ptr,
    rate_ptr,
    root_ptr,
    clip_ptr,
    frozen_ptr,
    width,
    n_elements,
    sphere_from,
    beta1,
    beta2,
    epsilon,
    HAS_COPY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if tl.load(frozen_ptr) == 0.0:
        row = tl.program_id(0)
        columns = tl.arange(0, COLUMNS)
        offsets = row.to(tl.int64) * width + columns
        inside = (columns < width) & (offsets < n_elements)
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + offsets, mask=inside, other=0.0)
        square = tl.load(square_ptr + offsets, mask=inside, other=0.0)
        if row >= sphere_from:
            grad -= tl.sum(grad * weight, axis=0) * weight
        grad *= tl.load(clip_ptr)
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        denominator = tl.sqrt(square) * tl.load(root_ptr) + epsilon
        weight -= tl.load(rate_ptr) * mean / denominator
        if row >= sphere_from:
            norm = tl.sqrt(tl.sum(weight * weight, axis=0))
            weight = weight / tl.maximum(norm, 1e-12)
        tl.store(weight_ptr + offsets, weight, mask=inside)
        if HAS_COPY:
            tl.store(copy_ptr + offsets, weight.to(copy_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + offsets, mean, mask=inside)
        tl.store(square_ptr + offsets, square, mask=inside)


def square_norms(grad: Tensor, weight: Tensor, sphere_from: int | None = None) -> Tensor:
    """‖gradient‖² of each row, after projection where the row lives on the unit sphere.

    Args:
        grad: contiguous float32, ``[rows, width]`` or ``[n]``.
        weight: like ``grad``.
        sphere_from: first row on the sphere; ``None`` for none.

    Returns:
        Float32 ``[rows]``; a vector counts as rows of `VECTOR_ROW`.
    """
    rows, width, columns = _rows(grad)
    out = torch.empty(rows, device=grad.device)
    first = rows if sphere_from is None else sphere_from
    _square_norm_kernel[(rows,)](
        grad, weight, out, width, grad.numel(), first, COLUMNS=columns, num_warps=_warps(columns)
    )
    return out


def adam(
    grad: Tensor,
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    scalars: AdamScalars,
    betas: tuple[float, float],
    epsilon: float,
    sphere_from: int | None = None,
    copy: Tensor | None = None,
) -> None:
    """One Adam step of one parameter, in place (Kingma & Ba, arXiv 1412.6980).

    Rows on the sphere have their gradient projected on its tangent first and are normalised after.

    Args:
        grad: contiguous float32, ``[rows, width]`` or ``[n]``; left as it is.
        weight: like ``grad``.
        moments: running mean and mean square of the gradient, each like ``grad``.
        scalars: of the step.
        betas: decay rates of the moments.
        epsilon: added to the denominator.
        sphere_from: first row on the sphere; ``None`` for none.
        copy: shaped like ``weight``, of any type; receives the new weights too.
    """
    rows, width, columns = _rows(grad)
    first = rows if sphere_from is None else sphere_from
    # The kernel never follows the pointer of an absent copy; `weight` only stands in for it.
    _adam_kernel[(rows,)](
        grad, weight, weight if copy is None else copy, *moments, *scalars, width, grad.numel(),
        first, *betas, epsilon, HAS_COPY=copy is not None, COLUMNS=columns,
        num_warps=_warps(columns),
    )  # fmt: skip


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    """Rows, their length, and the power of two that covers it."""
    width = tensor.shape[1] if tensor.ndim == 2 else VECTOR_ROW
    return triton.cdiv(tensor.numel(), width), width, triton.next_power_of_2(width)


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 256))
