"""The smooth augmented-Lagrangian penalty (M10; AL-CoLe, arXiv 2510.20995)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def psi(g: Tensor, y: Tensor) -> Tensor:
    """Ψ(g, y) = (max(0, 2g + y)² − y²)/4, so that ∂Ψ/∂g = max(0, 2g + y) (I5).

    Args:
        g: violations, any shape.
        y: multipliers over penalties λ/ρ, same shape.

    Returns:
        Same shape; continuous with its first derivative, and at most 0 where g ≤ 0.
    """
    return _psi(_reach(g, y), y)


def _reach(g: Tensor, y: Tensor) -> Tensor:
    return (2 * g + y).clamp_min(0)


def _psi(reach: Tensor, y: Tensor) -> Tensor:
    return (reach.square() - y.square()) / 4


def penalty(violations: Tensor, multipliers: Tensor, penalties: Tensor) -> Tensor:
    """Σ_i ρ_i·Ψ(g_i, λ_i/ρ_i), what constraints add to the objective (M10).

    Args:
        violations: g, ``[n]``, with gradient.
        multipliers: λ ≥ 0, ``[n]``; constants of the step.
        penalties: ρ > 0, ``[n]``; constants of the step.

    Returns:
        A scalar; its gradient in g_i is max(0, 2·ρ_i·g_i + λ_i).
    """
    rho = penalties.detach().to(violations.dtype)
    y = multipliers.detach().to(violations.dtype) / rho
    total: Tensor = _Penalty.apply(violations, y, rho)
    return total


class _Penalty(Function):
    """Σ_i ρ_i·Ψ(g_i, y_i), with its gradient made on the way there.

    These are scalars: on a GPU each operation costs the same, however little it does, and all of
    the backward pass waits for the last of them.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """``g``, ``y`` and ``rho`` of one shape; a scalar."""
        reach = _reach(g, y)
        ctx.save_for_backward(rho * reach)
        return (rho * _psi(reach, y)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None]:
        """ρ·max(0, 2g + y)."""
        (slope,) = ctx.saved_tensors
        return d_total * slope, None, None


def augmented_lagrangian(
    objective: Tensor, violations: Tensor, multipliers: Tensor, penalties: Tensor
) -> Tensor:
    """𝓛 = ℓ0 + Σ_i ρ_i·Ψ(g_i, λ_i/ρ_i) (M10).

    Args:
        objective: ℓ0, a scalar with gradient.
        violations: as in `penalty`.
        multipliers: likewise.
        penalties: likewise.

    Returns:
        A scalar; its gradient in g_i is max(0, 2·ρ_i·g_i + λ_i).
    """
    return objective + penalty(violations, multipliers, penalties)
