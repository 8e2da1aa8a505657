"""The setpoint loop: moves the error budget τ until L0 is what was asked for (M14)."""

from __future__ import annotations

from torch import Tensor


def move_setpoint(
    log_tau: Tensor,
    l0_ratio: Tensor,
    previous_ratio: Tensor,
    slow_violation: Tensor,
    elasticity: Tensor,
    *,
    integral: float,
    proportional: float,
    log_tau_floor: float,
    slack: float,
    tolerance: float,
) -> Tensor:
    """One move of log τ (M14): proportional-integral action on L0, and a bound on idleness.

    Action: with e = clip(L0/L0_ref − 1, ±1), log τ ← log τ + (k_s·e + k_p·Δe)/ε. Too many active
    features loosen the budget, too few tighten it. L0 answers τ with the elasticity
    ε = −d log L0/d log MSE, which the multiplier λ_faith measures; dividing by it makes the loop
    equally fast on every stretch of the frontier. The proportional part damps the swing that the
    lag of the inner loop would otherwise cause.

    Bound: the error may lie below the budget by ``slack``·clip(L0/L0_ref − 1, 0, 1) at most, plus
    ``tolerance``. Early in training the error falls much faster than the integral action can
    follow; without the bound the constraint goes idle, λ falls to 0, and the sparsity objective,
    alone, shuts features off long after L0 has passed its reference.

    The budget never falls below its floor (1 − R2_target)·Var: a reconstruction better than that
    is not worth more features.

    Args:
        log_tau: scalar.
        l0_ratio: slow average of L0/L0_ref, scalar.
        previous_ratio: the same one step earlier.
        slow_violation: slow average of g_faith, scalar.
        elasticity: λ_faith, scalar; taken as at least 1.
        integral: k_s per step; 0 switches the loop off, bound included.
        proportional: k_p.
        log_tau_floor: log of (1 − R2_target)·Var.
        slack: idleness tolerated while L0 is at twice its reference or above.
        tolerance: idleness tolerated always.

    Returns:
        The new log τ, a scalar.
    """
    if integral == 0:
        return log_tau
    excess, before = (l0_ratio - 1).clamp(-1, 1), (previous_ratio - 1).clamp(-1, 1)
    action = (integral * excess + proportional * (excess - before)) / elasticity.clamp_min(1)
    idle = (slow_violation + slack * excess.clamp_min(0) + tolerance).clamp_max(0)
    return (log_tau + action + idle).clamp_min(log_tau_floor)
