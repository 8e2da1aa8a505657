"""The smooth augmented-Lagrangian penalty (M10; AL-CoLe, arXiv 2510.20995)."""

from __future__ import annotations

from torch import Tensor


def psi(g: Tensor, y: Tensor) -> Tensor:
    """Ψ(g, y) = (max(0, 2g + y)² − y²)/4, so that ∂Ψ/∂g = max(0, 2g + y) (I5).

    Args:
        g: violations, any shape.
        y: multipliers over penalties λ/ρ, same shape.

    Returns:
        Same shape; continuous with its first derivative, and at most 0 where g ≤ 0.
    """
    return ((2 * g + y).clamp_min(0).square() - y.square()) / 4


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
    return (rho * psi(violations, y)).sum()


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
