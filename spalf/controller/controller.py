"""One immutable controller state, stepped once per optimiser step (M11–M14).

Everything is a tensor on the training device, so a step never waits for the host. The controller
sees vectors of violations and the achieved L0; it knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spalf.controller.capu import penalties
from spalf.controller.filters import Ema, ema_update, ema_value
from spalf.controller.laws import LAWS, LawState
from spalf.controller.setpoint import move_setpoint

UNDERSHOOT_GAIN = 10.0
"""Least λ_faith for each unit by which L0/L0_ref is below 1; at most 1."""

NOMINAL_ELASTICITY = 1.5
"""Elasticity below which the plant of g_faith answers λ faster than b₀ = ω_c says."""
LEAST_GAIN = 0.2
"""Least share of its gain that the law of λ_faith keeps; with none it would not move at all."""
ELASTICITY_RATE = 0.2
"""Rate of the average of λ_faith that is taken for the elasticity, in ω_c per step."""

FAITH = 0
"""Position of the faithfulness constraint, the one with a setpoint, in every vector."""


@dataclass(frozen=True)
class ControllerGains:
    """Constants of the controller during one phase.

    Attributes:
        law: ``adrc``, ``pi`` or ``gradient_ascent``.
        omega_c: controller bandwidth per step.
        omega_o: observer bandwidth per step.
        v_max: saturation of the violation.
        beta_fast: EMA that feeds the observer (M11).
        beta_slow: EMA that feeds gates, penalties and setpoint (M11).
        c_eta: CAPU scale; ``None`` freezes the penalties (Phase 2, and the ablation).
        k_s: integral gain of the setpoint loop per step; 0 switches the loop off.
        k_p: its proportional gain.
        log_tau_floor: lower bound of the setpoint.
        lambda_max: upper bound of the multipliers.
        tolerance: slow violation up to which a constraint counts as satisfied (M15).
    """

    law: str
    omega_c: float
    omega_o: float
    v_max: float
    beta_fast: float
    beta_slow: float
    c_eta: float | None
    k_s: float
    k_p: float
    log_tau_floor: float
    lambda_max: float = 100.0
    tolerance: float = 0.02


class ControllerState(NamedTuple):
    """State of the controller; float64 tensors, ``[n]`` per constraint unless said otherwise.

    Attributes:
        law: multipliers, disturbance estimate, previous saturated violation.
        fast: fast EMA of the violation.
        slow: slow EMA of the violation.
        mean_square: slow EMA of the squared fast violation.
        first: the first violation seen.
        rho: penalty coefficients.
        l0_ratio: slow EMA of L0/L0_ref, scalar; the ratio, so that a moving reference adds no lag.
        elasticity: average of λ_faith over the last 5/ω_c steps or so, scalar.
        log_tau: setpoint, scalar.
        satisfied: consecutive steps with every slow violation within tolerance, scalar.
    """

    law: LawState
    fast: Ema
    slow: Ema
    mean_square: Ema
    first: Tensor
    rho: Tensor
    l0_ratio: Ema
    elasticity: Tensor
    log_tau: Tensor
    satisfied: Tensor


class ControllerReading(NamedTuple):
    """What one step tells the controller.

    Attributes:
        violations: observed violations, ``[n]``, float64, detached.
        l0: achieved L0 of the batch, scalar, float64, detached.
        l0_ref: reference L0 of the step.
    """

    violations: Tensor
    l0: Tensor
    l0_ref: float | Tensor


def initial_state(
    multipliers: list[float], log_tau: float, device: torch.device
) -> ControllerState:
    """The state before the first step.

    Args:
        multipliers: λ at the start, one per constraint; the disturbance estimate starts there too.
        log_tau: setpoint at the start.
        device: where the state lives.
    """
    start = torch.tensor(multipliers, dtype=torch.float64, device=device)
    scalar = torch.zeros((), dtype=torch.float64, device=device)
    empty, nothing = Ema.zeros_like(start), torch.zeros_like(start)
    return ControllerState(
        law=LawState(start, start.clone(), nothing),
        fast=empty,
        slow=empty,
        mean_square=empty,
        first=nothing,
        rho=torch.ones_like(start),
        l0_ratio=Ema.zeros_like(scalar),
        elasticity=scalar + multipliers[FAITH],
        log_tau=scalar + log_tau,
        satisfied=scalar,
    )


def update(
    state: ControllerState, reading: ControllerReading, gains: ControllerGains
) -> ControllerState:
    """One step of filters, law, penalties and setpoint.

    Args:
        state: after the previous step.
        reading: this step's violations and L0.
        gains: constants of the phase.

    Returns:
        The next state; ``state`` is not modified.
    """
    fast = ema_update(state.fast, reading.violations, gains.beta_fast)
    slow = ema_update(state.slow, reading.violations, gains.beta_slow)
    g = ema_value(fast)
    v = g.clamp(-gains.v_max, gains.v_max)
    is_first = state.fast.weight == 0
    # The penalties see the violation unsaturated: how far from its bound is what they are about.
    first = torch.where(is_first, g, state.first)
    # Without this the observer would read the first violation as a jump from zero.
    previous = torch.where(is_first, v, state.law.previous)
    share = _shares_of_gain(state)
    law = LAWS[gains.law](
        state.law._replace(previous=share * previous),
        share * v,
        omega_c=gains.omega_c,
        omega_o=gains.omega_o,
        lambda_max=gains.lambda_max,
    )
    l0_ratio = ema_update(state.l0_ratio, reading.l0 / reading.l0_ref, gains.beta_slow)
    ratio = ema_value(l0_ratio)
    if gains.k_s > 0:
        law = _at_least(law, (UNDERSHOOT_GAIN * (1 - ratio)).clamp(0, 1))
    elasticity = state.elasticity + ELASTICITY_RATE * gains.omega_c * (
        law.multiplier[FAITH] - state.elasticity
    )
    mean_square = ema_update(state.mean_square, g.square(), gains.beta_slow)
    frozen = gains.c_eta is None
    rho = state.rho if frozen else penalties(ema_value(mean_square), first, gains.c_eta or 0.0)
    log_tau = move_setpoint(
        state.log_tau,
        ratio,
        torch.where(is_first, ratio, ema_value(state.l0_ratio)),
        ema_value(slow)[FAITH],
        law.multiplier[FAITH],
        integral=gains.k_s,
        proportional=gains.k_p,
        log_tau_floor=gains.log_tau_floor,
        slack=gains.v_max,
        tolerance=gains.tolerance,
    )
    within = (ema_value(slow) <= gains.tolerance).all()
    satisfied = torch.where(within, state.satisfied + 1, torch.zeros_like(state.satisfied))
    moved = ControllerState(
        law, fast, slow, mean_square, first, rho, l0_ratio, elasticity, log_tau, satisfied
    )
    return _rebase(moved, log_tau - state.log_tau, gains.v_max)


def _shares_of_gain(state: ControllerState) -> Tensor:
    """By what the law's gain is multiplied, ``[n]``: b₀ = ω_c/min(1, ε/1.5) for g_faith (M12).

    Adam's step follows the direction of ∇ℓ0 + λ∇g and not its length, and at rest λ is the
    elasticity ε. So a change of λ moves g in proportion to how large it is beside ε, and where ε
    is low a law made for b₀ = ω_c swings.
    """
    shares = torch.ones_like(state.rho)
    shares[FAITH] = (state.elasticity / NOMINAL_ELASTICITY).clamp(LEAST_GAIN, 1)
    return shares


def _at_least(law: LawState, floor: Tensor) -> LawState:
    """The same with λ_faith no lower than ``floor``; the observer will see what was applied.

    While fewer features are active than should be there is nothing to be gained from idleness:
    sparsity alone would go on shutting features off.
    """
    multiplier = law.multiplier.clone()
    multiplier[FAITH] = torch.maximum(multiplier[FAITH], floor)
    return law._replace(multiplier=multiplier)


def _rebase(state: ControllerState, shift: Tensor, v_max: float) -> ControllerState:
    """Express what the filters remember of g_faith = log(error/τ) in terms of the moved τ.

    A move of the setpoint is the controller's own doing; the observer must not take it for the
    plant's response.
    """
    shifts = torch.zeros_like(state.first)
    shifts[FAITH] = shift
    fast = state.fast._replace(raw=state.fast.raw - shifts * state.fast.weight)
    slow = state.slow._replace(raw=state.slow.raw - shifts * state.slow.weight)
    law = state.law._replace(previous=ema_value(fast).clamp(-v_max, v_max))
    return state._replace(law=law, fast=fast, slow=slow)


def to_tensors(state: ControllerState) -> dict[str, Tensor]:
    """The state as a flat mapping, for `spalf.checkpoint`."""
    flat: dict[str, Tensor] = {}
    for name, value in state._asdict().items():
        if isinstance(value, tuple):
            parts = value._asdict().items()  # type: ignore[attr-defined]
            flat |= {f"{name}.{part}": tensor for part, tensor in parts}
        else:
            flat[name] = value
    return flat


def pack(state: ControllerState) -> Tensor:
    """The whole state as one vector, so that it can be kept or moved by a single operation."""
    return torch.cat([value.reshape(-1) for value in to_tensors(state).values()])


def unpack(packed: Tensor, like: ControllerState) -> ControllerState:
    """Inverse of `pack`; the tensors are views of ``packed``, shaped as in ``like``."""
    shapes = {name: value.shape for name, value in to_tensors(like).items()}
    parts = packed.split([shape.numel() for shape in shapes.values()])
    return from_tensors(
        {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    )


def from_tensors(flat: dict[str, Tensor]) -> ControllerState:
    """Inverse of `to_tensors`."""

    def ema(name: str) -> Ema:
        return Ema(flat[f"{name}.raw"], flat[f"{name}.weight"])

    return ControllerState(
        law=LawState(*(flat[f"law.{part}"] for part in LawState._fields)),
        fast=ema("fast"),
        slow=ema("slow"),
        mean_square=ema("mean_square"),
        first=flat["first"],
        rho=flat["rho"],
        l0_ratio=ema("l0_ratio"),
        elasticity=flat["elasticity"],
        log_tau=flat["log_tau"],
        satisfied=flat["satisfied"],
    )
