from __future__ import annotations

import math
from typing import Any

import pytest

from spalf.evaluation import control_summary, integral_v2, settling_step


def _rows(ratio, every: int = 10, steps: int = 4000, arrival: int = 1000) -> list[dict[str, Any]]:
    """A log whose L0_ref falls from 64 to 16 by ``arrival``, with l0 at ``ratio(step)`` of it."""
    rows = []
    for step in range(0, steps, every):
        ref = 64 * 0.25 ** min(1.0, step / arrival)
        rows.append({"step": step, "phase": 1, "l0": ratio(step) * ref, "l0_ref": ref})
    return rows


def test_settles_when_the_reference_arrives_if_it_followed_it() -> None:
    assert settling_step(_rows(lambda _: 1.02)) == 1000


def test_a_deviation_that_never_ends_never_settles() -> None:
    assert settling_step(_rows(lambda _: 1.06)) is None
    assert settling_step([]) is None


@pytest.mark.parametrize("every", [5, 20])
def test_a_step_back_to_target_settles_after_the_filter(every: int) -> None:
    """From 20 % off, a .99-per-step average is within 5 % after ln 4 / .01 ≈ 139 steps."""
    settled = settling_step(_rows(lambda step: 1.2 if step < 2000 else 1.0, every))
    assert settled is not None
    assert abs(settled - (2000 + math.log(0.25) / math.log(0.99))) <= 2 * every


def test_a_late_excursion_restarts_the_clock() -> None:
    bump = _rows(lambda step: 1.5 if 2500 <= step < 2700 else 1.0)
    settled = settling_step(bump)
    assert settled is not None and settled > 2700
    assert settling_step(_rows(lambda step: 1.5 if step >= 3700 else 1.0)) is None


def test_noise_of_one_row_is_smoothed_away() -> None:
    assert settling_step(_rows(lambda step: 1.3 if step == 2000 else 1.0)) == 1000


def _violations(values: list[float], lam: float, every: int = 10) -> list[dict[str, Any]]:
    return [
        {"step": i * every, "phase": 1, "g_faith": value, "lambda_faith": lam}
        for i, value in enumerate(values)
    ]


def test_integral_of_a_constant_and_of_a_ramp() -> None:
    assert integral_v2(_violations([0.2] * 11, 1.0), "faith") == pytest.approx(0.04 * 100)
    ramp = [i / 1000 for i in range(1001)]
    assert integral_v2(_violations(ramp, 1.0, every=1), "faith") == pytest.approx(
        1000 / 3, rel=1e-5
    )


def test_slack_counts_only_while_the_multiplier_acts() -> None:
    slack = [-0.5] * 5
    assert integral_v2(_violations(slack, 0.0), "faith") == 0
    assert integral_v2(_violations(slack, 0.3), "faith") == pytest.approx(0.25 * 40)
    assert integral_v2(_violations([0.5] * 5, 0.0), "faith") == pytest.approx(0.25 * 40)


def test_a_constraint_that_was_not_logged_has_no_integral() -> None:
    assert integral_v2(_violations([0.1], 1.0), "ortho") is None
    assert integral_v2([{"step": 0, "g_ortho": None}], "ortho") is None


def test_summary_keeps_the_phases_apart() -> None:
    rows = [
        {"step": s, "phase": 1 if s < 50 else 2, "l0": 16.0, "l0_ref": 16.0}
        | {"g_faith": 0.1 if s < 50 else 0.2, "lambda_faith": 3.0 if s < 50 else 5.0}
        | {"g_drift": -1.0, "lambda_drift": 0.0}
        for s in range(0, 100, 10)
    ]
    first, second = (control_summary(rows, phase) for phase in (1, 2))
    assert first["lambda_final"] == {"faith": 3.0, "drift": 0.0, "ortho": None}
    assert second["lambda_final"]["faith"] == 5.0
    assert (first["settling_step"], second["settling_step"]) == (0, 50)
    assert first["integral_v2"]["faith"] == pytest.approx(0.01 * 40)
    assert second["integral_v2"] == {
        "faith": pytest.approx(0.04 * 40),
        "drift": 0.0,
        "ortho": None,
    }
    empty = control_summary([], 2)
    assert empty["settling_step"] is None and empty["lambda_final"]["faith"] is None
