"""What changes with the step, when Phase 1 ends, and the metrics log (M7, M9, M15)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from spalf.config import RunConfig, Schedule, schedule
from spalf.controller import Ema, initial_state
from spalf.training.loop import check_convergence, phase_end
from spalf.training.metrics import MetricsLog
from spalf.training.phase import Phase
from spalf.training.position import tokens_seen
from spalf.training.schedules import (
    LAMBDA_DISC_MAX,
    cooldown_progress,
    encoder_epsilon,
    l0_reference,
    lambda_disc,
    learning_rate,
    peak_learning_rate,
    phase_two_rate,
)
from spalf.training.state import TrainState
from tests.helpers_planted import planted_config

CONFIG = planted_config(steps=2000, L0_target=4.0)
PLAN = schedule(CONFIG)
COOLDOWN = PLAN.phase1_steps - PLAN.cooldown_steps


def test_steps_add_up_to_the_budget() -> None:
    assert PLAN.total_steps == 2000
    assert (PLAN.phase1_steps, PLAN.phase2_steps) == (1940, 4 * 60)
    assert schedule(planted_config(2000, method={"phase2_fraction": 0.0})).phase2_steps == 0


def test_learning_rate_warms_up_holds_and_decays_to_a_tenth() -> None:
    rates = [learning_rate(PLAN, 2.0, step, COOLDOWN) for step in range(1940)]
    assert rates[0] == pytest.approx(2.0 / PLAN.warmup_steps)
    assert rates[PLAN.warmup_steps - 1 : COOLDOWN + 1] == [2.0] * (COOLDOWN + 2 - PLAN.warmup_steps)
    assert rates[COOLDOWN + PLAN.cooldown_steps // 2] == pytest.approx(2.0 * 0.55, rel=1e-3)
    assert learning_rate(PLAN, 2.0, 1940, COOLDOWN) == pytest.approx(0.2)


def test_no_column_is_turned_by_more_than_a_twentieth_of_a_radian_a_step() -> None:
    assert peak_learning_rate(1e-3, 256) == 1e-3
    assert peak_learning_rate(1e-2, 256) == pytest.approx(0.05 / 16)
    assert peak_learning_rate(1e-2, 1024) == pytest.approx(0.05 / 32)


def test_phase_two_turns_columns_by_a_two_hundredth_of_a_radian_whatever_the_rate_was() -> None:
    low, high = (planted_config(lr=lr) for lr in (1e-3, 1e-2))
    assert phase_two_rate(low, 256) == phase_two_rate(high, 256) == pytest.approx(0.005 / 16)
    assert phase_two_rate(high, 64) == pytest.approx(0.005 / 8)
    assert phase_two_rate(planted_config(lr=1e-4), 256) == 1e-4
    assert phase_two_rate(planted_config(method={"phase2_lr": 7e-5}), 256) == 7e-5


def test_epsilon_of_the_encoder_grows_with_columns_per_dimension() -> None:
    assert encoder_epsilon(4096, 16384, 256) == pytest.approx(32 / (4096 * 256))
    assert encoder_epsilon(1024, 1024, 128) == pytest.approx(4 / (1024 * 128))


def test_learning_rate_decay_follows_an_early_cooldown() -> None:
    assert learning_rate(PLAN, 2.0, 1200, 1200) == 2.0
    assert learning_rate(PLAN, 2.0, 1200 + PLAN.cooldown_steps, 1200) == pytest.approx(0.2)


def test_l0_reference_falls_geometrically_to_the_target() -> None:
    half = PLAN.l0_ramp_steps // 2
    assert l0_reference(PLAN, 4.0, 0, 64) == pytest.approx(16.0)
    assert l0_reference(PLAN, 4.0, half, 64) == pytest.approx(8.0, rel=2e-3)
    values = [l0_reference(PLAN, 4.0, step, 64) for step in range(641)]
    ratios = [after / before for before, after in pairwise(values)]
    assert ratios == pytest.approx([ratios[0]] * 640)
    assert l0_reference(PLAN, 4.0, PLAN.l0_ramp_steps, 64) == 4.0
    assert l0_reference(PLAN, 4.0, PLAN.total_steps, 64) == 4.0


@pytest.mark.parametrize(
    ("d_model", "first"), [(64, 16.0), (32, 16.0), (12, 6.0), (8, 4.0), (3, 4.0)]
)
def test_the_ramp_starts_at_half_a_basis_at_most(d_model: int, first: float) -> None:
    """Four times its target, or d/2 where that is less; never less than the target."""
    assert l0_reference(PLAN, 4.0, 0, d_model) == pytest.approx(first)
    assert l0_reference(PLAN, 4.0, PLAN.l0_ramp_steps, d_model) == 4.0


def test_subthreshold_weight_ramps_over_the_cooldown_only() -> None:
    assert lambda_disc(PLAN, COOLDOWN, COOLDOWN) == 0.0
    half = COOLDOWN + PLAN.cooldown_steps // 2
    assert lambda_disc(PLAN, half, COOLDOWN) == pytest.approx(LAMBDA_DISC_MAX / 2)
    assert lambda_disc(PLAN, PLAN.total_steps, COOLDOWN) == LAMBDA_DISC_MAX == 0.01
    assert cooldown_progress(PLAN, 0, COOLDOWN) == 0.0


def state_at(step: int, **changes: Any) -> TrainState:
    """A state whose weights nobody looks at: only steps, history and controller matter."""
    nothing: Any = None
    state = TrainState(
        sae=nothing,
        optimizer=nothing,
        controller=initial_state([0.0] * 3, 0.0, torch.device("cpu")),
        step=step,
        phase=1,
        phase1_end=-1,
        cooldown_start=COOLDOWN,
        ended_by="budget",
        stale=torch.zeros(1),
        exchange_rate=nothing,
    )
    for name, value in changes.items():
        setattr(state, name, value)
    return state


def check_at(
    state: TrainState, step: int, log_tau: float = 0.0, l0: float = 1.0, satisfied: int = 100
) -> bool:
    """Run one convergence check on a fabricated controller; whether it ended the phase."""
    wide = torch.float64
    state.step = step
    state.controller = state.controller._replace(
        log_tau=torch.tensor(log_tau, dtype=wide),
        l0_ratio=Ema(torch.tensor(l0, dtype=wide), torch.tensor(1.0, dtype=wide)),
        satisfied=torch.tensor(float(satisfied), dtype=wide),
    )
    check_convergence(state, PLAN)
    return state.ended_by == "converged"


def test_phase_one_converges_once_everything_holds_still_after_the_ramp() -> None:
    state = state_at(0)
    window = PLAN.phase1_steps // 10
    for step in range(50, COOLDOWN, 50):
        if check_at(state, step):
            break
    first_possible = PLAN.l0_ramp_steps + window
    assert first_possible <= state.step < first_possible + 100
    assert state.cooldown_start == state.step
    phase: Any = Phase(1, None, None, None, None, 0, PLAN.phase1_steps, True)  # type: ignore[arg-type]
    assert phase_end(state, phase, PLAN) == state.step + PLAN.cooldown_steps < PLAN.phase1_steps


@pytest.mark.parametrize(
    "obstacle",
    [
        lambda step: {"satisfied": 99},
        lambda step: {"log_tau": -1e-4 * step},
        lambda step: {"l0": 1 + 1e-4 * step},
    ],
    ids=["not satisfied for long enough", "error still falls", "L0 still moves"],
)
def test_phase_one_goes_on_while_something_is_unsettled(obstacle: Any) -> None:
    state = state_at(0)
    assert not any(check_at(state, step, **obstacle(step)) for step in range(50, COOLDOWN, 50))
    assert state.cooldown_start == COOLDOWN
    assert state.ended_by == "budget"


def test_nothing_is_decided_once_the_cooldown_has_begun() -> None:
    state = state_at(0, history=[(PLAN.l0_ramp_steps, 0.0, 0.0)])
    assert not check_at(state, COOLDOWN)
    assert not check_at(state, COOLDOWN + 50)


def test_phase_two_ends_where_its_budget_ends() -> None:
    phase = Phase(2, None, None, None, None, 500, 560, False)  # type: ignore[arg-type]
    assert phase_end(state_at(510, cooldown_start=100), phase, PLAN) == 560


@pytest.mark.parametrize("L0_target", [0.5, 8.0, 60.0])
def test_l0_start_never_exceeds_half_the_dictionary(L0_target: float) -> None:
    config: RunConfig = planted_config(L0_target=L0_target)
    plan: Schedule = schedule(config)
    assert plan.l0_start_limit == min(4 * L0_target, 32.0)


def read(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_log_is_cut_back_to_the_checkpoint_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.append({"step": step, "l0": 0.1 * step})
    log.close()
    resumed = MetricsLog(path, resume_at=5)
    resumed.append({"step": 6, "l0": -1.0})
    resumed.close()
    assert read(path) == [1, 2, 3, 4, 5, 6]
    assert json.loads(path.read_text().splitlines()[-1])["l0"] == -1.0
    MetricsLog(path).close()
    assert read(path) == [], "a fresh run starts an empty log"


@pytest.mark.parametrize("torn", ['{"step": 4, "l0"', '{"step": 4}', "\x00\x00\x00", "{}x\n"])
def test_metrics_log_drops_a_torn_last_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 3}\n' + torn)
    log = MetricsLog(path, resume_at=9)
    log.append({"step": 4})
    log.close()
    assert read(path) == [2, 3, 4]


def test_metrics_rows_are_exact_after_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1, "l0": 1 / 3})
    log.sync()
    assert json.loads(path.read_text())["l0"] == 1 / 3
    log.close()


@pytest.mark.parametrize("seq_len, batch_size", [(16, 64), (16, 16), (8, 48)])
def test_phase_two_spends_the_tokens_it_was_given(seq_len: int, batch_size: int) -> None:
    """In steps of a quarter of a batch, or of one sequence where a batch has fewer than four."""
    config = planted_config(100, seq_len=seq_len, batch_size=batch_size)
    plan = schedule(config)
    assert plan.phase2_sequences == max(1, batch_size // seq_len // 4)
    end, steps = plan.phase1_steps, plan.phase1_steps + plan.phase2_steps
    assert tokens_seen(config, 40, -1) == 40 * batch_size
    assert tokens_seen(config, end, end) == end * batch_size
    assert tokens_seen(config, end + 1, end) - end * batch_size == plan.phase2_sequences * seq_len
    assert tokens_seen(config, steps, end) == plan.total_steps * batch_size
