"""Short runs on planted activations: I7, every ablation switch, and what a run records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from spalf.activations import ActivationStore
from spalf.checkpoint import Checkpoint
from spalf.config import RunConfig, schedule
from spalf.data import TokenSplits
from spalf.kernels import autoencode
from spalf.lagrangian import augmented_lagrangian
from spalf.steps.initialise import initialise_step
from spalf.steps.train import _fresh_state
from spalf.steps.training import _Sample
from spalf.training.loop import Hooks, run_phase
from spalf.training.phase import Phase, phase_one
from spalf.training.position import tokens_silent
from spalf.training.schedules import learning_rate, phase_two_rate
from spalf.training.state import TrainState, load_sae
from spalf.training.step import REVIVAL_RATE, LogRow, _forward, step_inputs, train_step
from tests.helpers_planted import (
    D_MODEL,
    PlantedModel,
    Run,
    context,
    planted_config,
    run_phases,
    stream,
)
from tests.helpers_planted import write_calibration as calibrated

STEPS = 60
Make = Callable[..., Run]


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Path]:
    """Calibrations, with and without whitening and by budget, each made once."""
    made: dict[tuple[bool, int], Path] = {}

    def get(config: RunConfig) -> Path:
        key = config.method.whitening, config.total_tokens
        if key not in made:
            made[key] = calibrated(config, tmp_path_factory.mktemp("calibration") / "calibration")
        return made[key]

    return get


@pytest.fixture(scope="module")
def base(calibrations: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = planted_config(STEPS)
    return run_phases(config, calibrations(config), tmp_path_factory.mktemp("base"))


@pytest.fixture
def ablated(calibrations: Any, tmp_path: Path) -> Make:
    def run(**method: Any) -> Run:
        config = planted_config(STEPS, method=method)
        return run_phases(config, calibrations(config), tmp_path)

    return run


def column(run: Run, name: str, step: str = "phase1") -> list[float]:
    return [row[name] for row in run.rows(step)]


def same_until(one: Run, other: Run, name: str) -> int:
    """Number of leading steps on which a column agrees."""
    pairs = zip(column(one, name), column(other, name), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), STEPS)


def held_out(run: Run, step: str) -> tuple[float, float]:
    """L0 and R² of a published SAE on tokens that no step has seen."""
    sae = load_sae(run.checkpoint(step), run.config, torch.device("cpu"))
    x = PlantedModel().activations(stream(256, 77).sequences(0, 256)).flatten(0, 1)
    with torch.no_grad():
        out = sae(x)
        spread = (x - x.mean(dim=0)).square().sum()
        return float(out.l0.mean()), 1 - float((x - out.x_hat).square().sum() / spread)


@pytest.mark.parametrize(
    ("L0_target", "R2_target"), [(3.0, 0.999), (5.0, 0.999), (6.0, 0.8)], ids=str
)
def test_i7_a_run_ends_at_its_l0_or_at_its_fidelity(
    calibrations: Any, tmp_path: Path, L0_target: float, R2_target: float
) -> None:
    config = planted_config(500, L0_target=L0_target, R2_target=R2_target)
    run = run_phases(config, calibrations(config), tmp_path)
    enough = R2_target
    for step in ("phase1", "phase2"):
        l0, r2 = held_out(run, step)
        assert abs(l0 / L0_target - 1) <= 0.03 or r2 >= enough, (step, l0, r2)
        assert r2 > 0.5
    if R2_target < 0.9:
        assert held_out(run, "phase1")[0] < L0_target, "fewer features were enough"
        assert "threshold_trim_phase1" not in run.checkpoint("phase1").metadata["state"]["derived"]


def test_i7_holds_before_the_threshold_trim(calibrations: Any, tmp_path: Path) -> None:
    """The controller does the work: what is left to the trim is small."""
    config = planted_config(500)
    run = run_phases(config, calibrations(config), tmp_path, end_to_end=False)
    factor = run.checkpoint("phase1").metadata["state"]["derived"]["threshold_trim_phase1"]
    assert factor == pytest.approx(1.0, abs=0.1)
    last = column(run, "l0")[-50:]
    assert sum(last) / len(last) == pytest.approx(config.L0_target, rel=0.1)


def test_thresholds_are_trimmed_on_the_first_training_tokens(
    calibrations: Any, tmp_path: Path
) -> None:
    """There L0 is exact at the end of both phases, but for a few activations that lie on a
    threshold; no token that judges it has been read."""
    config = planted_config(60)
    calibration = calibrations(config)
    run = run_phases(config, calibration, tmp_path)
    store = ActivationStore(PlantedModel(), TokenSplits.open(calibration / "tokens").train)
    x = torch.cat(list(_Sample(store)))
    for step in ("phase1", "phase2"):
        sae = load_sae(run.checkpoint(step), config, torch.device("cpu"))
        with torch.no_grad():
            assert float(sae(x).l0.mean()) == pytest.approx(config.L0_target, abs=8 / len(x))


def test_a_run_records_every_column_of_the_contract(base: Run) -> None:
    common = {"step", "tokens", "phase", "lr", "l0", "l0_ref", "mse", "explained_variance"}
    common |= {"log_tau", "dead_fraction"}
    for prefix in ("g", "lambda", "rho"):
        common |= {f"{prefix}_{name}" for name in ("faith", "drift", "ortho")}
    for step, extra in (("phase1", set()), ("phase2", {"kl"})):
        rows = base.rows(step)
        assert all(common | extra <= row.keys() for row in rows)
        assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "kl" not in base.rows()[0]
    assert column(base, "step") == list(range(1, 59))
    assert column(base, "step", "phase2") == list(range(59, 59 + 4 * 2))
    assert column(base, "tokens", "phase2")[-1] == 60 * base.config.batch_size


def test_the_last_step_of_a_phase_is_logged_however_short_it_is(
    calibrations: Any, tmp_path: Path
) -> None:
    config = planted_config(STEPS, runtime={"log_every_steps": 25, "device": "cpu"})
    run = run_phases(config, calibrations(config), tmp_path)
    assert column(run, "step") == [25, 50, 58]
    assert column(run, "step", "phase2") == [58 + 4 * 2]


def test_phase_two_enters_without_a_bump(base: Run) -> None:
    """L0 reference, penalties and budget go on where they were; the rate is Phase 2's own."""
    last, first = base.rows()[-1], base.rows("phase2")[0]
    assert 0.1 * base.config.lr < last["lr"] < 0.2 * base.config.lr
    derived = base.checkpoint("phase2").metadata["state"]["derived"]
    assert first["lr"] == derived["lr_phase2"] == phase_two_rate(base.config, D_MODEL)
    assert first["l0_ref"] == last["l0_ref"] == base.config.L0_target
    for name in ("faith", "drift", "ortho"):
        assert first[f"rho_{name}"] == last[f"rho_{name}"]
    assert first["log_tau"] == pytest.approx(last["log_tau"], abs=0.2)


def test_every_derived_parameter_of_a_finished_run_has_a_value(base: Run) -> None:
    for row in base.checkpoint("phase2").metadata["derived"]:
        assert row["value"] is not None, row["name"]


def test_first_violation_is_the_log_of_twice_the_budget(base: Run) -> None:
    first = base.rows()[0]
    assert first["g_faith"] == pytest.approx(math.log(2), abs=0.2), "τ starts at half the error"
    assert first["lambda_faith"] > 0


def final_law(run: Run) -> dict[str, torch.Tensor]:
    control = run.checkpoint("phase1").tensors["control"]
    return {k.removeprefix("law."): v for k, v in control.items() if k.startswith("law.")}


def test_pi_integrates_the_violation(ablated: Make, base: Run) -> None:
    run = ablated(controller="pi")
    assert same_until(run, base, "lambda_faith") == 0
    law = final_law(run)
    expected = (law["estimate"] + law["previous"]).clamp(min=0)
    # `previous` is re-expressed after a move of the setpoint, by at most that move.
    assert float((law["multiplier"] - expected).abs().max()) < 0.05
    assert (law["estimate"] >= 0).all()


def test_gradient_ascent_has_no_other_state_than_the_multiplier(ablated: Make, base: Run) -> None:
    run = ablated(controller="gradient_ascent")
    law = final_law(run)
    assert torch.equal(law["estimate"], law["multiplier"])
    assert not torch.equal(final_law(base)["estimate"], final_law(base)["multiplier"])


def test_moreau_changes_the_gradient_from_the_first_step_on(ablated: Make, base: Run) -> None:
    run = ablated(surrogate="moreau")
    assert same_until(run, base, "gradient_norm") == 0
    assert same_until(run, base, "mse") == 1, "the forward pass is the same"


def test_a_centred_gradient_is_another_from_the_first_step_on(ablated: Make, base: Run) -> None:
    run = ablated(centred_gradient=True)
    assert same_until(run, base, "gradient_norm") == 0
    assert same_until(run, base, "mse") == 1, "the forward pass is the same"


@pytest.mark.parametrize("metric", ["mahalanobis", "euclidean"])
def test_other_metrics_measure_another_error(ablated: Make, base: Run, metric: str) -> None:
    run = ablated(metric=metric)
    one, other = base.rows()[0], run.rows()[0]
    assert one["mse"] == other["mse"]
    assert one["g_faith"] != pytest.approx(other["g_faith"], abs=1e-3)


def test_without_whitening_the_encoder_sees_centred_activations(ablated: Make, base: Run) -> None:
    def gains(checkpoint: Checkpoint) -> torch.Tensor:
        return checkpoint.tensors["tensors"]["whitener.eigenvalues"]

    assert gains(ablated(whitening=False).checkpoint("phase1")).numel() == 0
    assert gains(base.checkpoint("phase1")).numel() == PlantedModel().d_model


def test_inverse_whitening_changes_the_encoder_only_in_direction(ablated: Make, base: Run) -> None:
    run = ablated(encoder_init="inverse_whitening")
    one, other = (r.checkpoint("init").tensors["model"] for r in (base, run))
    assert torch.equal(one["W_dec"], other["W_dec"])
    cosine = torch.nn.functional.cosine_similarity(one["W_enc"], other["W_enc"])
    assert cosine.median() < 0.9


def test_without_anchors_nothing_drifts(ablated: Make, base: Run) -> None:
    run = ablated(anchors=False)
    assert run.checkpoint("phase1").tensors["tensors"]["anchors"].shape[0] == 0
    assert set(column(run, "g_drift")) == {-1.0}
    assert base.checkpoint("phase1").tensors["tensors"]["anchors"].shape[0] == 4
    assert max(column(base, "g_drift")) > -1.0


def test_without_orthogonality_its_violation_is_never_seen(ablated: Make, base: Run) -> None:
    run = ablated(orthogonality=False)
    assert set(column(run, "g_ortho")) == {-1.0}
    assert set(column(run, "lambda_ortho")) == {0.0}
    assert len(set(column(base, "g_ortho"))) > 10


def test_without_capu_penalties_stay_at_one(ablated: Make) -> None:
    run = ablated(capu=False)
    for name in ("faith", "drift", "ortho"):
        assert set(column(run, f"rho_{name}")) == {1.0}


def test_capu_lowers_the_penalty_of_a_constraint_far_from_its_bound(
    calibrations: Any, tmp_path: Path
) -> None:
    config = planted_config(STEPS, constants={"c_ortho": 0.05})
    run = run_phases(config, calibrations(config), tmp_path, end_to_end=False)
    assert max(column(run, "g_ortho")) > 5
    assert min(column(run, "rho_ortho")) < 1.0


def test_without_the_setpoint_loop_the_budget_is_fixed(ablated: Make, base: Run) -> None:
    run = ablated(setpoint=False)
    assert len(set(column(run, "log_tau") + column(run, "log_tau", "phase2"))) == 1
    assert len(set(column(base, "log_tau"))) > 10
    derived = run.checkpoint("phase2").metadata["state"]["derived"]
    assert not any("trim" in name for name in derived)


def test_without_the_l0_schedule_the_reference_is_the_target(ablated: Make, base: Run) -> None:
    run = ablated(l0_schedule=False)
    assert set(column(run, "l0_ref")) == {4.0}
    half = PlantedModel().d_model / 2
    assert column(base, "l0_ref")[0] == half
    quantiles = [r.checkpoint("init").metadata["measured"]["theta_quantile"] for r in (run, base)]
    assert quantiles == [1 - 4 / 64, 1 - half / 64]


def test_without_phase_two_the_first_result_is_handed_through(ablated: Make) -> None:
    run = ablated(phase2_fraction=0.0)
    assert len(run.rows()) == STEPS
    assert run.rows("phase2") == []
    one, two = run.checkpoint("phase1"), run.checkpoint("phase2")
    for stem in ("model", "tensors", "control", "optimizer"):
        assert one.tensors[stem].keys() == two.tensors[stem].keys()
        for name, value in one.tensors[stem].items():
            assert torch.equal(value.nan_to_num(-7), two.tensors[stem][name].nan_to_num(-7)), name


def test_v_cap_sets_the_size_of_the_anchored_stratum(ablated: Make) -> None:
    assert ablated(v_cap=7).checkpoint("phase1").tensors["tensors"]["anchors"].shape[0] == 7


def test_the_free_columns_are_on_the_sphere_after_training(base: Run) -> None:
    decoder = base.checkpoint("phase2").tensors["model"]["W_dec"]
    torch.testing.assert_close(decoder[4:].norm(dim=1), torch.ones(60))


def started(calibrations: Any, directory: Path, config: RunConfig) -> tuple[TrainState, Phase]:
    """The state before the first step, and its phase."""
    initialise_step(config, calibrations(config), directory / "init", context())
    state = _fresh_state(config, directory / "init", torch.device("cpu"))
    store = ActivationStore(PlantedModel(), stream(512, 0))
    return state, phase_one(config, store, state.sae)


def test_the_gradient_of_a_step_is_tangent_for_free_columns_only(
    calibrations: Any, tmp_path: Path
) -> None:
    config = planted_config(20)
    state, phase = started(calibrations, tmp_path, config)
    before = state.sae.W_dec.detach().clone()
    record = train_step(state, next(phase.batches(0)), phase, config, schedule(config))
    gradient = state.sae.W_dec.grad
    assert gradient is not None
    radial = (gradient * before).sum(dim=1).abs()
    assert radial[4:].max() < 1e-6
    assert radial[:4].max() > 1e-4
    assert record.gradient_norm > 1
    total = sum(float(p.grad.square().sum()) for p in state.sae.parameters() if p.grad is not None)
    assert total**0.5 == pytest.approx(1.0, rel=1e-3), "clipped"


def test_the_losses_of_a_step_are_the_augmented_lagrangian_with_every_constraint(
    calibrations: Any, tmp_path: Path
) -> None:
    """In value, and in the price of each violation, orthogonality's included (I5)."""
    config = planted_config(20)
    state, phase = started(calibrations, tmp_path, config)
    law = state.controller.law._replace(multiplier=torch.tensor([2.0, 3.0, 5.0]).double())
    state.controller = state.controller._replace(law=law)
    plan = schedule(config)
    inputs = step_inputs(state, config, plan)._replace(lambda_disc=0.0)
    passed = _forward(state, (next(phase.batches(0)),), phase, config, plan, inputs)
    violations, losses = passed.violations, torch.stack(passed.losses).sum()
    expected = augmented_lagrangian(
        passed.observed.output.l0.mean() / inputs.l0_ref,
        torch.stack(list(violations)),
        law.multiplier,
        state.controller.rho,
    )
    torch.testing.assert_close(losses, expected)
    prices = torch.autograd.grad(losses, list(violations), retain_graph=True)
    wanted = (2 * state.controller.rho * violations.observed() + law.multiplier).clamp_min(0)
    torch.testing.assert_close(torch.stack(prices).double(), wanted)
    assert wanted[2] > 0, "else orthogonality would have no say here"


def test_features_that_never_fire_are_counted_as_dead(
    calibrations: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = planted_config(20)
    state, phase = started(calibrations, tmp_path, config)
    with torch.no_grad():
        state.sae.b_enc[:3] = -1e3
    for batch in islice(phase.batches(0), 8):
        record = train_step(state, batch, phase, config, schedule(config))
    assert state.stale[:3].tolist() == [8, 8, 8]
    assert (state.stale[3:] < 8).all()
    monkeypatch.setattr("spalf.training.step.DEAD_TOKENS", 8 * config.batch_size)
    assert LogRow(state, record, config).read()["dead_fraction"] == 3 / 64
    monkeypatch.setattr("spalf.training.step.DEAD_TOKENS", 8 * config.batch_size + 1)
    assert LogRow(state, record, config).read()["dead_fraction"] == 0.0


def test_a_step_that_was_not_finite_has_no_row(calibrations: Any, tmp_path: Path) -> None:
    config = planted_config(20)
    state, phase = started(calibrations, tmp_path, config)
    record = train_step(state, next(phase.batches(0)), phase, config, schedule(config))
    before, one = LogRow(state, record, config), torch.ones(())
    state.guard.observe(torch.nan * one, one)
    row = before.read()
    assert row is not None, "of the step before it"
    assert row["step"] == 1
    assert LogRow(state, record, config).read() is None


def test_silence_is_counted_in_tokens_which_a_step_of_phase_two_has_fewer_of(
    calibrations: Any, tmp_path: Path
) -> None:
    config = planted_config(20)
    state, _ = started(calibrations, tmp_path, config)
    state.step, state.stale[:3] = 30, torch.tensor([0, 7, 12])
    batch, per_step = config.batch_size, schedule(config).phase2_sequences * config.seq_len
    assert per_step < batch
    assert tokens_silent(state, config)[:3].tolist() == [0, 7 * batch, 12 * batch]
    state.phase, state.phase1_end = 2, 20
    expected = [0, 7 * per_step, 10 * per_step + 2 * batch]
    assert tokens_silent(state, config)[:3].tolist() == expected


def test_bandwidth_is_refreshed(calibrations: Any, tmp_path: Path) -> None:
    config = planted_config(110, method={"phase2_fraction": 0.0})
    run = run_phases(config, calibrations(config), tmp_path, end_to_end=False)
    before, after = (run.checkpoint(s).tensors["tensors"]["bandwidth"] for s in ("init", "phase1"))
    assert not torch.equal(before, after)
    assert schedule(config).phase1_steps == 110


def fresh_run(config: RunConfig, calibration: Path, tmp_path: Path) -> tuple[TrainState, Phase]:
    """A run before its first step."""
    initialise_step(config, calibration, tmp_path / "init", context())
    state = _fresh_state(config, tmp_path / "init", torch.device("cpu"))
    store = ActivationStore(PlantedModel(), stream(4096, 0))
    return state, phase_one(config, store, state.sae)


def test_the_threshold_of_a_silent_feature_sinks_until_it_fires(
    calibrations: Any, tmp_path: Path
) -> None:
    config = planted_config(STEPS, method={"anchors": False, "orthogonality": False})
    state, phase = fresh_run(config, calibrations(config), tmp_path)
    plan = replace(schedule(config), silence_steps=3)
    with torch.no_grad():
        state.sae.log_threshold[5] = 20.0
    sunk, silent = [], []
    for batch in islice(phase.batches(0), 8):
        before = state.sae.log_threshold.detach().clone()
        train_step(state, batch, phase, config, plan)
        sunk.append(float((before - state.sae.log_threshold.detach())[5]))
        silent.append(int(state.stale[5]))
    assert silent == list(range(1, 9))
    assert sunk[:3] == [0.0] * 3, "its gradient is exactly zero"
    rates = [learning_rate(plan, config.lr, step, state.cooldown_start) for step in range(3, 8)]
    assert sunk[3:] == pytest.approx([REVIVAL_RATE * rate for rate in rates], rel=1e-3)


def test_a_step_whose_lists_were_too_short_is_done_again_with_more_room(
    calibrations: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes back to that step and ends where it ends without the mishap."""
    config = planted_config(STEPS)
    ends, margins = [], []
    for mishap in (False, True):
        state, phase = fresh_run(config, calibrations(config), tmp_path / str(mishap))
        calls = 0

        def short(*args: Any, fails: bool = mishap) -> Any:
            nonlocal calls
            calls += 1
            done = autoencode(*args)
            return replace(done, overflow=torch.tensor(True)) if fails and calls == 7 else done

        monkeypatch.setattr("spalf.sae.stratified.autoencode", short)
        hooks = Hooks(lambda row: None, lambda state: None, lambda step: False, lambda: False)
        run_phase(state, replace(phase, last_step=20, may_converge=False), config, hooks)
        ends.append({n: t.detach().clone() for n, t in state.sae.named_parameters()})
        margins.append(state.sae.list_margin)
    assert margins == [1.0, 2.0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_rate_that_is_too_high_is_held_and_said_so(
    calibrations: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    high = planted_config(STEPS, lr=0.1, runtime={"log_every_steps": 1, "device": "cpu"})
    run = run_phases(high, calibrations(high), tmp_path / "high")
    limit = 0.05 / PlantedModel().d_model ** 0.5
    assert f"lr = 0.1 is held at {limit:.3g}" in caplog.text
    assert max(column(run, "lr")) == pytest.approx(limit)
    assert max(column(run, "lr", "phase2")) == pytest.approx(limit / 10)
