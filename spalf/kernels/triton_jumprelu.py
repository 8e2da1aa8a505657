"""JumpReLU with a surrogate threshold gradient (M4, M6), fused in Triton.

One pass each way. The forward pass reads the pre-activations once and writes the codes and one
partial sum per row and column block; the backward pass reads pre-activations and code gradients
once and writes d_pre and one partial sum per column and row block. The partial sums are added in a
second, small reduction of fixed order, so results repeat bit for bit: there are no floating-point
atomics.

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

from spalf.kernels.reference import Surrogate

FORWARD_TILE = (1, 4096)
"""Rows and columns a forward program handles. The tiles are among the fastest of those tried on
an H200 at 4096 × 32768, in bfloat16 and float32, that leave programs enough for smaller calls."""

BACKWARD_TILE = (4, 1024)
"""Rows and columns of one backward tile."""

BACKWARD_ROWS = 64
"""Rows a backward program walks, tile by tile, before it writes its partial sums."""


@triton.jit
def _forward_kernel(
    pre_ptr,
    threshold_ptr,
    z_ptr,
    l0_ptr,  # [column blocks, tokens]
    sub_ptr,  # [column blocks, tokens]
    n_rows,
    n_columns,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row_inside = rows < n_rows
    column_inside = columns < n_columns
    inside = row_inside[:, None] & column_inside[None, :]
    # 64-bit, because tokens × features passes 2³¹ at sizes that fit in memory.
    offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]

    theta = tl.load(threshold_ptr + columns, mask=column_inside, other=0.0)[None, :]
    pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = (pre > theta) & inside
    # A product, as in M4, not a choice: a NaN then reaches z instead of being gated away.
    z = pre * gate.to(tl.float32)
    below = pre - z
    below = tl.where(below > 0.0, below, below * 0.0)
    tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=inside)

    partial = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(l0_ptr + partial, tl.sum(gate.to(tl.float32), axis=1), mask=row_inside)
    tl.store(sub_ptr + partial, tl.sum(below * below, axis=1), mask=row_inside)


@triton.jit
def _backward_kernel(
    pre_ptr,
    threshold_ptr,
    bandwidth_ptr,
    dz_ptr,
    dl0_ptr,
    dsub_ptr,
    d_pre_ptr,
    d_threshold_ptr,  # [row blocks, d_sae]
    n_rows,
    n_columns,
    HAS_DZ: tl.constexpr,
    HAS_DL0: tl.constexpr,
    HAS_DSUB: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_THRESHOLD: tl.constexpr,
    MOREAU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    column_inside = columns < n_columns
    theta = tl.load(threshold_ptr + columns, mask=column_inside, other=0.0)[None, :]
    epsilon = tl.load(bandwidth_ptr + columns, mask=column_inside, other=0.0)[None, :]
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for start in range(0, BLOCK_ROWS, TILE_ROWS):
        rows = tl.program_id(0) * BLOCK_ROWS + start + tl.arange(0, TILE_ROWS)
        row_inside = rows < n_rows
        inside = row_inside[:, None] & column_inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gate = (pre > theta).to(tl.float32)
        d_pre = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
        d_gate = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
        if HAS_DZ:
            dz = tl.load(dz_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            d_pre = dz * gate
            d_gate = dz * theta
        if HAS_DL0:
            d_gate += tl.load(dl0_ptr + rows, mask=row_inside, other=0.0)[:, None]
        if HAS_DSUB:
            dsub = tl.load(dsub_ptr + rows, mask=row_inside, other=0.0)[:, None]
            below = pre - pre * gate
            below = tl.where(below > 0.0, below, below * 0.0)
            d_pre += 2.0 * dsub * below
            d_gate -= dsub * theta * theta
        if WANT_PRE:
            tl.store(d_pre_ptr + offsets, d_pre.to(d_pre_ptr.dtype.element_ty), mask=inside)
        if WANT_THRESHOLD:
            u = pre - theta
            if MOREAU:
                window = u * gate * (u < epsilon).to(tl.float32)
            else:
                window = (tl.abs(u) < 0.5 * epsilon).to(tl.float32)
            total += tl.where(inside, d_gate * window, 0.0)
    if WANT_THRESHOLD:
        # The factor of w: 1/ε, or 1/γ = 2/ε². An empty window (ε = 0) has no weight.
        width = tl.load(bandwidth_ptr + columns, mask=column_inside, other=0.0)
        safe = tl.where(width > 0.0, width, 1.0)
        if MOREAU:
            safe = 0.5 * safe * safe
        column_sum = tl.where(width > 0.0, tl.div_rn(tl.sum(total, axis=0), safe), 0.0)
        partial = tl.program_id(0).to(tl.int64) * n_columns + columns
        tl.store(d_threshold_ptr + partial, -column_sum, mask=column_inside)


class TritonJumpReLU(torch.autograd.Function):
    """(pre, threshold, bandwidth, surrogate) → (z, l0, sub); see `spalf.kernels.jumprelu`."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor, surrogate: Surrogate
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes z [tokens, d_sae], l0 [tokens] and sub [tokens]; keeps only the inputs."""
        pre = pre.contiguous()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pre, threshold, bandwidth)
        ctx.surrogate = surrogate
        return launch_forward(pre, threshold)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dz: Tensor | None, dl0: Tensor | None, dsub: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of pre and threshold; those of outputs nobody used arrive as ``None``."""
        pre, threshold, bandwidth = ctx.saved_tensors
        want_pre = ctx.needs_input_grad[0] and not (dz is None and dsub is None)
        d_pre, d_threshold = launch_backward(
            pre, threshold, bandwidth, ctx.surrogate, (dz, dl0, dsub),
            want_pre=want_pre, want_threshold=ctx.needs_input_grad[1],
        )  # fmt: skip
        return d_pre, d_threshold, None, None


def launch_forward(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel: (z, l0, sub) of contiguous ``pre`` [tokens, d_sae]."""
    n_rows, n_columns = pre.shape
    tile_rows, tile_columns = FORWARD_TILE
    grid = (triton.cdiv(n_rows, tile_rows), triton.cdiv(n_columns, tile_columns))
    z = torch.empty_like(pre)
    partial = torch.empty((2, grid[1], n_rows), dtype=torch.float32, device=pre.device)
    if pre.numel():
        _forward_kernel[grid](
            pre, threshold.contiguous(), z, partial[0], partial[1], n_rows, n_columns,
            TILE_ROWS=tile_rows, TILE_COLUMNS=tile_columns,
        )  # fmt: skip
    l0, sub = partial.sum(dim=1)
    return z, l0, sub


def launch_backward(
    pre: Tensor,
    threshold: Tensor,
    bandwidth: Tensor,
    surrogate: Surrogate,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    want_pre: bool,
    want_threshold: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Run the backward kernel on contiguous ``pre`` [tokens, d_sae].

    Args:
        pre: pre-activations, contiguous.
        threshold: θ, [d_sae], float32.
        bandwidth: ε, [d_sae], float32.
        surrogate: whose weight w to use.
        gradients: of (z, l0, sub); ``None`` where an output was not used, which is then not read.
        want_pre: compute d_pre.
        want_threshold: compute d_threshold.

    Returns:
        d_pre [tokens, d_sae] and d_threshold [d_sae] float32; ``None`` for what is not wanted.
    """
    if not (want_pre or want_threshold):
        return None, None
    n_rows, n_columns = pre.shape
    tile_rows, tile_columns = BACKWARD_TILE
    grid = (triton.cdiv(n_rows, BACKWARD_ROWS), triton.cdiv(n_columns, tile_columns))
    d_pre = torch.empty_like(pre) if want_pre else None
    partial = torch.empty((grid[0], n_columns), dtype=torch.float32, device=pre.device)
    dz, dl0, dsub = (None if grad is None else grad.contiguous() for grad in gradients)
    # The kernel never follows an absent tensor's pointer; `pre` only stands in for it.
    pointers = [pre if tensor is None else tensor for tensor in (dz, dl0, dsub, d_pre)]
    if pre.numel():
        _backward_kernel[grid](
            pre, threshold.contiguous(), bandwidth.contiguous(), *pointers, partial,
            n_rows, n_columns,
            HAS_DZ=dz is not None, HAS_DL0=dl0 is not None, HAS_DSUB=dsub is not None,
            WANT_PRE=want_pre, WANT_THRESHOLD=want_threshold, MOREAU=surrogate == "moreau",
            BLOCK_ROWS=BACKWARD_ROWS, TILE_ROWS=tile_rows, TILE_COLUMNS=tile_columns,
        )  # fmt: skip
    return d_pre, partial.sum(dim=0) if want_threshold else None
