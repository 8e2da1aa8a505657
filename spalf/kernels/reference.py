"""JumpReLU with a surrogate threshold gradient (M4, M6), in plain PyTorch.

This is the definition the Triton kernels are tested against, and what runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Surrogate = Literal["rectangle", "moreau"]
"""The two surrogates of the unit step in M6."""

BLOCK_ELEMENTS = 2**16
"""Pre-activations handled at a time on a CPU: a few such temporaries fit in a core's cache."""


def surrogate_scale(bandwidth: Tensor, surrogate: Surrogate) -> Tensor:
    """The constant factor of the surrogate weight w of each feature (M6).

    ``rectangle``: w = scale·1[|u| < ε/2], scale = 1/ε. ``moreau``: w = scale·u·1[0 < u < ε],
    scale = 1/γ = 2/ε². Both weights integrate to one over u = pre − θ.

    Args:
        bandwidth: ε, [d_sae], in the units of the pre-activation. Where it is 0 the window is
            empty and the scale is 0, not infinite.
        surrogate: which of the two.

    Returns:
        [d_sae], float32.
    """
    epsilon = bandwidth.float()
    scale = 1 / epsilon if surrogate == "rectangle" else 2 / epsilon.square()
    return torch.where(epsilon > 0, scale, 0.0)


class ReferenceJumpReLU(torch.autograd.Function):
    """(pre, threshold, bandwidth, surrogate) → (z, l0, sub); see `spalf.kernels.jumprelu`.

    Comparisons are written as float tensors through ``out=``: on a CPU, arithmetic on booleans
    costs several times as much as arithmetic on floats. The work is done in blocks of rows there,
    so that temporaries stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor, surrogate: Surrogate
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes z [tokens, d_sae], l0 [tokens] and sub [tokens]; keeps only the inputs."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pre, threshold, bandwidth)
        ctx.surrogate = surrogate
        z = torch.empty_like(pre)
        l0, sub = torch.empty((2, len(pre)), dtype=torch.float32, device=pre.device)
        for rows in _row_blocks(pre):
            value, z_rows = pre[rows].float(), z[rows]
            gate = _compare(torch.gt, value, threshold)
            torch.sum(gate, dim=1, out=l0[rows])
            torch.mul(value, gate, out=z_rows)
            # value - z is pre where the gate is shut and exactly 0 where it is open.
            below = torch.sub(value, z_rows, out=gate).relu_()
            torch.sum(below.square_(), dim=1, out=sub[rows])
        return z, l0, sub

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dz: Tensor | None, dl0: Tensor | None, dsub: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of pre and threshold; those of outputs nobody used arrive as ``None``."""
        pre, theta, bandwidth = ctx.saved_tensors
        want_pre = ctx.needs_input_grad[0] and not (dz is None and dsub is None)
        d_pre = torch.empty_like(pre) if want_pre else None
        d_theta = torch.zeros_like(theta) if ctx.needs_input_grad[1] else None
        for rows in _row_blocks(pre):
            value = pre[rows].float()
            gate = _compare(torch.gt, value, theta)
            grads = _rows_of(dz, rows), _rows_of(dl0, rows), _rows_of(dsub, rows)
            if d_pre is not None:
                _pre_gradient(value, gate, grads[0], grads[2], out=d_pre[rows])
            if d_theta is not None:
                window = _window(value, gate, theta, bandwidth, ctx.surrogate)
                d_theta += _gate_gradient(window.shape, theta, *grads).mul_(window).sum(dim=0)
        if d_theta is not None:
            d_theta.mul_(surrogate_scale(bandwidth, ctx.surrogate)).neg_()
        return d_pre, d_theta, None, None


def _row_blocks(pre: Tensor) -> list[slice]:
    """Slices that cover the rows: everything at once on a GPU, cache-sized blocks elsewhere."""
    n_rows, n_columns = pre.shape
    step = n_rows if pre.is_cuda else max(1, BLOCK_ELEMENTS // max(1, n_columns))
    return [slice(start, start + step) for start in range(0, n_rows, max(1, step))]


def _rows_of(gradient: Tensor | None, rows: slice) -> Tensor | None:
    return None if gradient is None else gradient[rows].float()


def _compare(comparison: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
    """A comparison as 0.0 and 1.0, of the shape and type of ``left``."""
    return comparison(left, right, out=torch.empty_like(left))


def _pre_gradient(
    value: Tensor, gate: Tensor, dz: Tensor | None, dsub: Tensor | None, *, out: Tensor
) -> None:
    """Write dz·gate + 2·dsub·relu(pre)·(1 - gate), [tokens, d_sae]; one of the two is present."""
    if dsub is not None:
        below = torch.addcmul(value, value, gate, value=-1).relu_().mul_(2 * dsub.unsqueeze(1))
        out.copy_(below if dz is None else below.addcmul_(dz, gate))
    elif dz is not None:
        torch.mul(dz, gate, out=out)


def _gate_gradient(
    shape: torch.Size, theta: Tensor, dz: Tensor | None, dl0: Tensor | None, dsub: Tensor | None
) -> Tensor:
    """∂L/∂gate at pre = θ, [tokens, d_sae]: dz·θ + dl0 - dsub·θ², a fresh tensor.

    The products are elementwise rather than a matrix product so that neither autocast nor TF32
    lowers their precision.
    """
    if dz is None:
        d_gate = theta.new_zeros(shape) if dl0 is None else dl0.unsqueeze(1).expand(shape).clone()
    elif dl0 is None:
        d_gate = dz * theta
    else:
        d_gate = torch.addcmul(dl0.unsqueeze(1), dz, theta)
    return d_gate if dsub is None else d_gate.addcmul_(dsub.unsqueeze(1), theta.square(), value=-1)


def _window(
    value: Tensor, gate: Tensor, theta: Tensor, epsilon: Tensor, surrogate: Surrogate
) -> Tensor:
    """The surrogate weight without its scale, [tokens, d_sae]."""
    u = value - theta
    if surrogate == "rectangle":
        return _compare(torch.lt, u.abs_(), epsilon / 2)
    return _compare(torch.lt, u.mul_(gate), epsilon).mul_(u)
