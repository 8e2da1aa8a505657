"""Control laws for the multipliers: ADRC, and the two it is measured against (M12).

The plant, per constraint, is ġ = f − b₀·λ with b₀ = ω_c: raising the multiplier lowers the
violation, against a disturbance f that drifts as the network learns. Every law is a pure function
of its state and the saturated violation v; the integral gain ω_o is the same in all three.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LawState(NamedTuple):
    """State of a control law, one entry per constraint.

    Attributes:
        multiplier: λ_{t−1}, after projection.
        estimate: d̂, the disturbance estimate (ADRC) or the integral (PI).
        previous: v_{t−1}.
    """

    multiplier: Tensor
    estimate: Tensor
    previous: Tensor


def adrc(
    state: LawState, v: Tensor, *, omega_c: float, omega_o: float, lambda_max: float
) -> LawState:
    """First-order active disturbance rejection (ADRC-Lagrangian, arXiv 2601.18142).

    Extended state observer: d̂ ← d̂ + ω_o·[(v_t − v_{t−1})/ω_c + λ_{t−1} − d̂]; law:
    λ_t = max(0, d̂ + v_t). The observer sees the projected λ_{t−1}, which is the anti-windup.

    Args:
        state: after the previous update.
        v: saturated violation, ``[n]``.
        omega_c: controller bandwidth per update, which is also the plant gain b₀.
        omega_o: observer bandwidth per update, in (0, 1).
        lambda_max: upper bound of the multipliers.

    Returns:
        The next state.
    """
    innovation = (v - state.previous) / omega_c + state.multiplier - state.estimate
    estimate = state.estimate + omega_o * innovation
    return LawState((estimate + v).clamp(0, lambda_max), estimate, v)


def proportional_integral(
    state: LawState, v: Tensor, *, omega_c: float, omega_o: float, lambda_max: float
) -> LawState:
    """PI: I ← max(0, I + ω_o·v), λ = max(0, I + v) (an ablation; arXiv 2509.22500)."""
    estimate = (state.estimate + omega_o * v).clamp(0, lambda_max)
    return LawState((estimate + v).clamp(0, lambda_max), estimate, v)


def gradient_ascent(
    state: LawState, v: Tensor, *, omega_c: float, omega_o: float, lambda_max: float
) -> LawState:
    """Dual gradient ascent: λ ← max(0, λ + ω_o·v) (an ablation)."""
    multiplier = (state.multiplier + omega_o * v).clamp(0, lambda_max)
    return LawState(multiplier, multiplier, v)


def bandwidth_for(omega: float, steps: int) -> float:
    """A per-step bandwidth turned into that of an update every ``steps`` steps."""
    return float(1 - (1 - omega) ** steps)


LAWS = {"adrc": adrc, "pi": proportional_integral, "gradient_ascent": gradient_ascent}
