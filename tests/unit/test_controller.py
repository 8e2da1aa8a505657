"""Filters, control laws and the setpoint loop on problems with known solutions (M11–M14)."""

from __future__ import annotations

import math

import pytest
import torch

from spalf.controller import (
    ControllerGains,
    ControllerReading,
    Ema,
    LawState,
    ema_update,
    ema_value,
    initial_state,
    move_setpoint,
    penalties,
    update,
)
from spalf.controller.controller import from_tensors, to_tensors
from spalf.controller.laws import LAWS, bandwidth_for

OMEGA_C, OMEGA_O, V_MAX = 0.01, 0.05, 0.3


def simulate(law: str, steps: int = 6000, noise: float = 0.05, seed: int = 0) -> torch.Tensor:
    """v of the plant ġ = f − b₀λ + noise, with f stepping from 3 to 5 half-way."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([4.0], dtype=torch.float64)
    state, g, trace = LawState(start, start, torch.zeros_like(start)), torch.ones(1).double(), []
    fast = Ema.zeros_like(g)
    for step in range(steps):
        measured = g + noise * torch.randn(1, generator=generator, dtype=torch.float64)
        fast = ema_update(fast, measured, 0.9)
        v = ema_value(fast).clamp(-V_MAX, V_MAX)
        state = LAWS[law](state, v, omega_c=OMEGA_C, omega_o=OMEGA_O, lambda_max=100.0)
        disturbance = 3.0 if step < steps // 2 else 5.0
        g = g + OMEGA_C * (disturbance - state.multiplier)
        trace.append(g.clone())
    return torch.cat(trace)


def test_ema_is_exact_on_a_constant_from_the_first_update() -> None:
    ema = Ema.zeros_like(torch.zeros(2, dtype=torch.float64))
    value = torch.tensor([3.0, -1.0], dtype=torch.float64)
    for _ in range(3):
        ema = ema_update(ema, value, 0.99)
        assert torch.allclose(ema_value(ema), value)


def test_i6_adrc_settles_without_steady_state_error() -> None:
    trace = simulate("adrc")
    for half in (trace[2000:3000], trace[5000:]):
        assert half.mean().abs() < 0.01
        assert half.abs().max() < 0.1


def test_i6_adrc_has_the_smallest_squared_violation() -> None:
    cost = {law: simulate(law).clamp(-V_MAX, V_MAX).square().sum().item() for law in LAWS}
    assert cost["adrc"] < 0.5 * cost["pi"]
    assert cost["adrc"] < 0.5 * cost["gradient_ascent"]


def test_multiplier_at_rest_is_the_disturbance() -> None:
    start = torch.tensor([4.0], dtype=torch.float64)
    state, g = LawState(start, start, torch.zeros_like(start)), torch.ones(1).double()
    for _ in range(5000):
        v = g.clamp(-V_MAX, V_MAX)
        state = LAWS["adrc"](state, v, omega_c=OMEGA_C, omega_o=OMEGA_O, lambda_max=100.0)
        g = g + OMEGA_C * (2.5 - state.multiplier)
    assert state.multiplier.item() == pytest.approx(2.5, abs=1e-3)
    assert g.item() == pytest.approx(0.0, abs=1e-3)


def test_adrc_does_not_wind_up_while_the_constraint_is_slack() -> None:
    """Long slack, then a violation: the multiplier must come back within the observer's time."""
    zero = torch.zeros(1, dtype=torch.float64)
    state = LawState(zero, zero, zero)
    law, v = LAWS["adrc"], torch.full((1,), V_MAX, dtype=torch.float64)
    for _ in range(5000):
        state = law(state, -v, omega_c=OMEGA_C, omega_o=OMEGA_O, lambda_max=100.0)
    for _ in range(20):
        state = law(state, v, omega_c=OMEGA_C, omega_o=OMEGA_O, lambda_max=100.0)
    assert state.multiplier.item() > 0


def test_updates_every_k_steps_track_updates_every_step() -> None:
    """The observer's decay over K steps is the same however it is discretised."""
    assert bandwidth_for(OMEGA_O, 1) == pytest.approx(OMEGA_O)
    assert pytest.approx(1 - bandwidth_for(OMEGA_O, 7)) == (1 - OMEGA_O) ** 7


def test_penalties_are_bounded_and_come_back_up() -> None:
    first = torch.tensor([0.25], dtype=torch.float64)
    far = penalties(torch.tensor([400.0], dtype=torch.float64), first, 1.0)
    near = penalties(torch.tensor([9.0], dtype=torch.float64), first, 1.0)
    closest = penalties(torch.zeros(1, dtype=torch.float64), first, 1.0)
    assert far.item() == pytest.approx(0.1)
    assert near.item() == pytest.approx(2 / 3, rel=1e-6)
    assert closest.item() == pytest.approx(1.0)


def moved(
    log_tau: torch.Tensor, ratio: float, violation: float, floor: float, elasticity: float = 1.0
) -> torch.Tensor:
    now = torch.tensor(ratio, dtype=torch.float64)
    return move_setpoint(
        log_tau,
        now,
        now,
        torch.tensor(violation, dtype=torch.float64),
        torch.tensor(elasticity, dtype=torch.float64),
        integral=0.01,
        proportional=0.5,
        log_tau_floor=floor,
        slack=0.3,
        tolerance=0.02,
    )


def test_setpoint_moves_towards_the_target_and_stops_at_the_floor() -> None:
    log_tau, floor = torch.zeros((), dtype=torch.float64), math.log(0.5)
    assert moved(log_tau, 3.0, 0.0, floor).item() == pytest.approx(0.01), "clipped at 1"
    assert moved(log_tau, 1.5, 0.0, floor, 2.5).item() == pytest.approx(0.01 * 0.5 / 2.5)
    for _ in range(1000):
        log_tau = moved(log_tau, 0.5, 0.0, floor)
    assert log_tau.item() == pytest.approx(floor)


def test_idle_budget_is_pulled_to_the_error() -> None:
    """At its reference the budget may exceed the error by the tolerance, at twice it by slack."""
    log_tau = torch.zeros((), dtype=torch.float64)
    assert moved(log_tau, 1.0, -1.0, -9.0).item() == pytest.approx(-0.98)
    assert moved(log_tau, 2.0, -1.0, -9.0).item() == pytest.approx(-0.68 + 0.01)
    assert moved(log_tau, 1.0, -0.01, -9.0).item() == pytest.approx(0.0)


def test_a_move_of_the_setpoint_is_not_taken_for_the_plants_response() -> None:
    """The estimate must not jump on the step after τ was pulled down by a whole unit."""
    state = initial_state([4.0, 0.0, 0.0], 0.0, torch.device("cpu"))
    tight = gains(k_s=0.003)
    for _ in range(3):
        before = state.law.estimate[0].item()
        g = -1.0 - state.log_tau.item()
        state = update(state, reading(g), tight)
        assert abs(state.law.estimate[0].item() - before) < 0.1


def gains(**changes: object) -> ControllerGains:
    base: dict[str, object] = {
        "law": "adrc",
        "omega_c": OMEGA_C,
        "omega_o": OMEGA_O,
        "v_max": V_MAX,
        "beta_fast": 0.9,
        "beta_slow": 0.99,
        "c_eta": 1.0,
        "k_s": 0.003,
        "k_p": 0.5,
        "log_tau_floor": -10.0,
    }
    return ControllerGains(**(base | changes))  # type: ignore[arg-type]


def reading(g: float, l0: float = 10.0) -> ControllerReading:
    violations = torch.tensor([g, -1.0, -1.0], dtype=torch.float64)
    return ControllerReading(violations, torch.tensor(l0, dtype=torch.float64), 10.0)


def test_controller_brings_the_setpoint_to_where_l0_is_on_target() -> None:
    """A frontier L0 = 40/τ with elasticity 1: the loop must find τ = 4 for L0 = 10."""
    state = initial_state([4.0, 0.0, 0.0], math.log(8.0), torch.device("cpu"))
    log_error = math.log(8.0)
    for _ in range(6000):
        # The network moves its error with the multiplier: at rest λ equals the elasticity.
        log_error += 0.01 * (1.0 - state.law.multiplier[0].item())
        g = log_error - state.log_tau.item()
        state = update(state, reading(g, 40.0 / math.exp(log_error)), gains())
    assert math.exp(state.log_tau.item()) == pytest.approx(4.0, rel=0.02)
    assert state.law.multiplier[0].item() == pytest.approx(1.0, abs=0.05)
    assert state.satisfied > 100


def test_faithfulness_is_not_given_up_while_too_few_features_are_active() -> None:
    """λ_faith ≥ min(1, 10·(1 − L0/L0_ref)), and nothing of the kind without the setpoint loop."""
    start = initial_state([0.0, 0.0, 0.0], log_tau=0.0, device=torch.device("cpu"))
    floors = [
        float(update(start, reading(-1.0, l0), gains(k_s=k_s)).law.multiplier[0])
        for l0, k_s in ((5.0, 0.01), (9.6, 0.01), (12.0, 0.01), (5.0, 0.0))
    ]
    assert floors == pytest.approx([1.0, 0.4, 0.0, 0.0], abs=1e-9)


def swing(elasticity: float) -> float:
    """Standard deviation of g at rest, on a plant that answers λ in proportion to λ/ε.

    g falls by .028·(u/ε − 1) a step, which is what training at a constant rate was seen to do;
    u is λ + 2ρg, smoothed over ten steps as Adam's momentum does.
    """
    state = initial_state([4.0, 0.0, 0.0], 0.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    g, force, trace = 0.02, elasticity, []
    for _ in range(6000):
        measured = g + 0.007 * float(torch.randn((), generator=generator))
        applied = max(0.0, float(state.law.multiplier[0]) + 2 * measured)
        state = update(state, reading(measured), gains(k_s=0.0))
        force = 0.9 * force + 0.1 * applied
        g -= 0.028 * (force / elasticity - 1)
        trace.append(g)
    return float(torch.tensor(trace[-2000:]).std())


@pytest.mark.parametrize("elasticity", [0.25, 0.5, 1.0, 1.5, 3.0])
def test_the_loop_rests_at_any_elasticity(elasticity: float) -> None:
    assert swing(elasticity) < 0.005


def test_the_law_swings_where_its_gain_does_not_follow_the_elasticity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the test above is about, and that its plant shows it."""
    monkeypatch.setattr("spalf.controller.controller.LEAST_GAIN", 1.0)
    assert swing(0.5) > 0.05
    assert swing(1.5) < 0.005


def test_the_gain_is_whole_from_an_elasticity_of_one_and_a_half() -> None:
    """So that what is trained there has the same bits, whatever happens below."""
    for elasticity, share in ((4.0, 1.0), (1.5, 1.0), (0.75, 0.5), (0.0, 0.2)):
        state = initial_state([0.0, 0.0, 0.0], 0.0, torch.device("cpu"))
        state = state._replace(elasticity=torch.tensor(elasticity, dtype=torch.float64))
        after = update(state, reading(0.1), gains(k_s=0.0, omega_o=0.0))
        assert after.law.multiplier.tolist() == pytest.approx([0.1 * share, 0.0, 0.0])


def test_an_idle_multiplier_comes_back() -> None:
    """Long slack takes the elasticity to nearly nothing; a violation still raises λ."""
    state = initial_state([4.0, 0.0, 0.0], 0.0, torch.device("cpu"))
    for _ in range(5000):
        state = update(state, reading(-0.3), gains(k_s=0.0))
    assert float(state.elasticity) < 0.01
    for _ in range(60):
        state = update(state, reading(0.3), gains(k_s=0.0))
    assert float(state.law.multiplier[0]) > 0.1


def test_frozen_penalties_do_not_move() -> None:
    state = initial_state([0.0, 0.0, 0.0], 0.0, torch.device("cpu"))
    for _ in range(10):
        state = update(state, reading(50.0), gains(c_eta=None))
    assert torch.equal(state.rho, torch.ones(3, dtype=torch.float64))


def test_state_survives_the_checkpoint_format() -> None:
    state = initial_state([4.0, 0.0, 0.0], 0.3, torch.device("cpu"))
    for step in range(5):
        state = update(state, reading(0.1 * step), gains())
    again = from_tensors(dict(to_tensors(state)))
    one, two = update(state, reading(0.2), gains()), update(again, reading(0.2), gains())
    for name, value in to_tensors(one).items():
        assert torch.equal(value, to_tensors(two)[name]), name
