"""Threshold trim, the entry to Phase 2 and its gradients, and where its data come from (M16)."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from spalf.activations import ActivationStore, buffer_position
from spalf.bench.problem import Pool, Shape, config_for, run_on
from spalf.config import RunConfig, schedule
from spalf.constraints import faithfulness_violation
from spalf.controller import initial_state
from spalf.controller.controller import to_tensors
from spalf.models import load_model
from spalf.sae import StratifiedSAE
from spalf.training.phase import (
    enter_phase_two,
    metric_variance,
    observe_end_to_end,
    phase_one,
    phase_two,
    sequence_batches,
)
from spalf.training.schedules import learning_rate
from spalf.training.state import TrainState, make_optimizer
from spalf.training.step import step_inputs, train_step
from spalf.training.trim import LOWEST_FACTOR, threshold_factor, trim_thresholds
from spalf.whitening import SoftZCA
from tests.helpers_planted import (
    BATCH,
    SEQ_LEN,
    PlantedModel,
    allocated,
    correlated,
    planted_config,
    stream,
    trained_like,
)


def transparent_sae(d: int) -> StratifiedSAE:
    """pre = x and θ = 1."""
    sae = StratifiedSAE(
        SoftZCA.identity(torch.zeros(d)), d, torch.zeros(0, d), 1.0, kernel="reference"
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
    return sae


def test_threshold_factor_known_answer() -> None:
    """Ratios .6 to 2.5; L0 = 1 on four tokens leaves the four largest: between 2.2 and 2.3."""
    x = torch.arange(0.6, 2.55, 0.1).view(4, 5)
    factor = threshold_factor(transparent_sae(5), [x[:2], x[2:]], 1.0)
    assert factor == pytest.approx((2.1 + 2.2) / 2)
    sae = transparent_sae(5)
    trim_thresholds(sae, factor)
    assert (sae.encode(x) > 0).sum() == 4
    torch.testing.assert_close(sae.threshold.detach(), torch.full((5,), factor))


def test_thresholds_are_not_lowered_without_limit() -> None:
    x = torch.full((4, 5), 0.4)
    assert threshold_factor(transparent_sae(5), [x], 1.0) == LOWEST_FACTOR


@pytest.mark.parametrize("l0_target", [1.5, 4.0, 9.0])
def test_threshold_factor_solves_l0_on_the_activations_it_was_given(l0_target: float) -> None:
    x = correlated(3000, 16, 0)
    sae = trained_like(x, 64, l0=5)
    factor = threshold_factor(sae, x.split(1000), l0_target)
    with torch.no_grad():
        l0 = float((sae.scaled_thresholds(factor).encode(x) > 0).sum()) / len(x)
    assert l0 == pytest.approx(l0_target, abs=2 / len(x))
    assert (factor < 1) == (l0_target > 5)


def planted_state(config: RunConfig, log_tau: float = 0.7) -> tuple[TrainState, ActivationStore]:
    """The state at the end of a Phase 1 that did nothing but initialise."""
    store = ActivationStore(PlantedModel(), stream(512, 0))
    return state_for(config, trained_like(store.harvest(0, 256), config.F), log_tau), store


def state_for(config: RunConfig, sae: StratifiedSAE, log_tau: float) -> TrainState:
    return TrainState(
        sae=sae,
        optimizer=make_optimizer(sae, config),
        controller=initial_state([4.0, 0.1, 0.2], log_tau, torch.device("cpu")),
        step=schedule(config).phase1_steps,
        phase=1,
        phase1_end=-1,
        cooldown_start=0,
        ended_by="budget",
        stale=torch.zeros(config.F, dtype=torch.int64),
        exchange_rate=torch.full((), torch.nan, dtype=torch.float64),
    )


def test_thresholds_do_not_sink_in_phase_two() -> None:
    """What 3 % of the tokens bring back finds no use any more, and L0 is taken from the others."""
    config = planted_config(steps=1000)
    state, store = planted_state(config)
    enter_phase_two(state, config, store)
    with torch.no_grad():
        state.sae.log_threshold[:3] = 5.0  # out of reach of every pre-activation
    state.stale += 10**6
    phase = phase_two(config, store, state.sae, state.phase1_end)
    train_step(state, next(phase.batches(0)), phase, config, schedule(config))
    assert state.sae.log_threshold[:3].tolist() == [5.0] * 3


def mean_squared_error(sae: StratifiedSAE, store: ActivationStore, tokens: Tensor) -> Tensor:
    x = store.model.activations(tokens).flatten(0, 1)
    return sae(x).residual.square().sum(dim=1).mean().double()


def test_entry_to_phase_two_is_bumpless() -> None:
    config = planted_config(steps=1000)
    state, store = planted_state(config)
    before = {name: value.clone() for name, value in to_tensors(state.controller).items()}
    weights = {name: value.clone() for name, value in state.sae.state_dict().items()}
    enter_phase_two(state, config, store)
    assert (state.phase, state.phase1_end) == (2, state.step)
    assert state.optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    for name, value in to_tensors(state.controller).items():
        assert torch.equal(value, before[name]), f"{name} must carry over"
    for name, value in state.sae.state_dict().items():
        assert torch.equal(value, weights[name]), name

    tokens = list(islice(sequence_batches(config, store, state.step, 0), 64))
    with torch.no_grad():
        errors = [observe_end_to_end(state, t, store, config).error.double() for t in tokens]
        plain = [mean_squared_error(state.sae, store, t) for t in tokens]
    log_tau = state.controller.log_tau
    one, two = (faithfulness_violation(torch.stack(e).mean(), log_tau) for e in (plain, errors))
    assert float(two) == pytest.approx(float(one), abs=1e-5)
    assert float(one) != pytest.approx(0.0, abs=0.05), "the bump would show only away from zero"


@pytest.mark.parametrize("metric", ["fisher", "euclidean", "mahalanobis"])
def test_exchange_rate_is_the_ratio_of_the_two_errors_at_entry(metric: str) -> None:
    config = planted_config(steps=1000, method={"metric": metric})
    state, store = planted_state(config)
    enter_phase_two(state, config, store)
    rate = float(state.exchange_rate)
    tokens = list(islice(sequence_batches(config, store, state.step, 0), 64))
    state.exchange_rate = torch.zeros_like(state.exchange_rate)
    with torch.no_grad():
        observed = [observe_end_to_end(state, t, store, config) for t in tokens]
    kl = sum(float(o.kl) for o in observed if o.kl is not None) / 64
    error = sum(2 * float(o.error) for o in observed) / 64
    assert rate == pytest.approx(error / kl, rel=1e-4)
    assert state.derived["kl_scale"] == pytest.approx(kl, rel=1e-4)


def test_i8_phase_two_gradients_reach_decoder_encoder_and_thresholds() -> None:
    """Through the frozen upper layers of a real model, by way of the divergence alone."""
    config = planted_config(
        model_name="spalf/demo-2l", hook_point="blocks.0.hook_resid_post", steps=1000
    )
    model = load_model(config.model_name, config.hook_point, device="cpu")
    store = ActivationStore(model, stream(64, 0))
    sae = trained_like(store.harvest(0, 64), config.F)
    state = state_for(config, sae, 0.0)
    state.exchange_rate = torch.ones_like(state.exchange_rate)
    observed = observe_end_to_end(state, store.sequences(0, 4), store, config)
    divergence = 2 * observed.error - sae_error(observed.output.residual)
    assert float(divergence.detach()) == pytest.approx(float(observed.kl), rel=1e-4)  # type: ignore[arg-type]
    divergence.backward()
    for name in ("W_dec", "W_enc", "log_threshold", "b_dec"):
        gradient = getattr(sae, name).grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
    assert not any(p.requires_grad for p in model._model.parameters())  # type: ignore[attr-defined]


def sae_error(residual: Tensor) -> Tensor:
    return residual.square().sum(dim=1).mean()


def test_phase_two_trains_on_sequences_that_phase_one_has_not_seen() -> None:
    config = planted_config(steps=200)
    plan = schedule(config)
    store = ActivationStore(PlantedModel(), stream(10_000, 0))
    for end in (1, 7, 100, plan.phase1_steps):
        chunk, _ = buffer_position(end - 1, BATCH, plan.block_tokens)
        seen = store.sequences(0, (chunk + 1) * plan.block_tokens // SEQ_LEN)
        first = next(sequence_batches(config, store, end, 0))
        assert first.shape == (BATCH // SEQ_LEN // 4, SEQ_LEN)
        assert torch.equal(first, store.sequences(len(seen), BATCH // SEQ_LEN // 4))
        later = next(sequence_batches(config, store, end, 3))
        assert torch.equal(later, list(islice(sequence_batches(config, store, end, 0), 4))[3])


def test_phases_differ_in_data_penalties_gain_and_length() -> None:
    config = planted_config(steps=1000)
    plan = schedule(config)
    state, store = planted_state(config)
    one, two = phase_one(config, store, state.sae), phase_two(config, store, state.sae, 970)
    assert (one.first_step, one.last_step, one.may_converge) == (0, plan.phase1_steps, True)
    assert (two.first_step, two.last_step, two.may_converge) == (970, 970 + 4 * 30, False)
    assert next(one.batches(0)).shape == (BATCH, PlantedModel().d_model)
    assert next(two.batches(0)).shape == (BATCH // SEQ_LEN // 4, SEQ_LEN)
    assert one.gains.c_eta == 1.0
    assert two.gains.c_eta is None, "CAPU is frozen in Phase 2"
    assert (one.average_from, two.average_from) == (None, 970 + 4 * 15)
    assert (one.gains.k_s, two.gains.k_s) == (plan.k_s, plan.k_s_phase2)
    assert two.gains.log_tau_floor == one.gains.log_tau_floor


def test_metric_variance_is_the_error_of_the_mean() -> None:
    x = correlated(5000, 16, 0)
    sae = allocated(x, 32)
    residual = (x - x.mean(dim=0)) / sae.scale
    euclidean = float(residual.square().sum(dim=1).mean())
    assert metric_variance(sae, "euclidean") == pytest.approx(euclidean, rel=1e-4)
    whitened = float(sae.whitener.mahalanobis(x - x.mean(dim=0)).mean())
    assert metric_variance(sae, "mahalanobis") == pytest.approx(whitened, rel=1e-3)


def test_metric_variance_counts_the_complement_of_a_low_rank_whitener() -> None:
    x = correlated(5000, 16, 0)
    full = allocated(x, 32)
    covariance = torch.cov(x.double().T, correction=0)
    moments: Any = type("M", (), {})()
    moments.count, moments.mean, moments.covariance = len(x), x.double().mean(dim=0), covariance
    moments.variance = float(covariance.trace())
    low = SoftZCA.fit(moments, 100.0, 0.2, max_full_rank=8)
    assert low.U.shape[1] < 16
    full.whitener = low
    whitened = float(low.mahalanobis(x - x.mean(dim=0)).mean())
    assert metric_variance(full, "mahalanobis") == pytest.approx(whitened, rel=1e-3)


def one_step(monkeypatch: pytest.MonkeyPatch, **constants: float) -> TrainState:
    """A planted run after its first step of Phase 1."""
    for name, value in constants.items():
        module = "descent" if name == "THRESHOLD_STEP" else "step"
        monkeypatch.setattr(f"spalf.training.{module}.{name}", value)
    shape = Shape(d_model=16, F=48, L0=4, batch=128)
    config, pool = config_for(shape), Pool(shape, torch.device("cpu"))
    state, phase = run_on(config, pool)
    state.stale += 10**6 * (torch.arange(shape.F) < 3)
    with torch.no_grad():
        state.sae.log_threshold[:3] = 5.0  # out of reach of every pre-activation
    train_step(state, pool.x[: shape.batch], phase, config, schedule(config))
    return state


def test_thresholds_move_three_times_as_far_as_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = [
        one_step(monkeypatch, THRESHOLD_STEP=by, REVIVAL_RATE=0.0).sae for by in (0.0, 1.0, 3.0)
    ]
    still, once, thrice = (sae.log_threshold.detach().double() for sae in ends)
    assert (once - still).abs().max() > 0
    torch.testing.assert_close(thrice - still, 3 * (once - still), rtol=1e-2, atol=1e-6)
    assert torch.equal(ends[0].W_enc, ends[2].W_enc)


def test_thresholds_of_silent_features_sink_with_the_learning_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = one_step(monkeypatch)
    shape = Shape(d_model=16, F=48, L0=4, batch=128)
    config = config_for(shape)
    lr = learning_rate(schedule(config), config.lr, state.step - 1, state.cooldown_start)
    expected = torch.full((3,), 5.0 - 3 * lr)
    torch.testing.assert_close(state.sae.log_threshold[:3].detach(), expected, rtol=0, atol=1e-6)


def test_one_firing_does_not_throw_the_encoder_of_a_feature_that_was_silent_for_long() -> None:
    """Its second moments hold nothing, so Adam alone would take the one gradient for a common one.

    After such a gradient and 50 steps without any, Adam has moved a weight by 27 learning rates.
    """
    shape = Shape(d_model=16, F=1024, L0=4, batch=128)
    config = config_for(shape)
    state, _ = run_on(config, Pool(shape, torch.device("cpu")))
    optimizer, sae, lr = state.optimizer, state.sae, 1e-3
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    for parameter in sae.parameters():
        optimizer.state[parameter] = {
            "step": torch.full((), 10_000.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    for group in optimizer.param_groups:
        group["lr"] = lr
    for step in range(51):
        for parameter in sae.parameters():
            # Of one token and a rare feature, as measured.
            one = 30 / (config.batch_size * sae.d_model) if step == 0 else 0.0
            parameter.grad = torch.full_like(parameter, one)
        optimizer.step()
    moved = {
        name: float((before[name] - value.detach()).abs().mean() / lr)
        for name, value in sae.named_parameters()
    }
    assert moved["W_dec"] == pytest.approx(moved["log_threshold"], rel=1e-2)
    assert moved["W_dec"] > 25
    assert 0.5 < moved["W_enc"] < 2
    assert 0.5 < moved["b_enc"] < 2


def test_phase_two_has_a_rate_of_its_own_if_asked_for() -> None:
    config = planted_config(40)
    own = config.model_copy(update={"method": config.method.model_copy(update={"phase2_lr": 7e-5})})
    plan, state = schedule(config), one_step_state(config)
    assert step_inputs(state, config, plan).lr == pytest.approx(0.005 / state.sae.d_model**0.5)
    assert step_inputs(state, own, plan).lr == 7e-5
    state.phase = 1
    tenth = config.lr * plan.lr_final_ratio
    assert step_inputs(state, own, plan).lr == pytest.approx(tenth)


def one_step_state(config: RunConfig) -> TrainState:
    """At the beginning of Phase 2, as far as schedules can tell."""
    shape = Shape(d_model=16, F=48, L0=4, batch=128)
    state, _ = run_on(config_for(shape), Pool(shape, torch.device("cpu")))
    plan = schedule(config)
    state.phase, state.step = 2, plan.phase1_steps
    state.cooldown_start = plan.phase1_steps - plan.cooldown_steps
    return state


def test_room_for_lists_is_given_back_where_less_than_a_quarter_is_used() -> None:
    sae = transparent_sae(4)
    encoded = sae(torch.zeros(2, 4)).encoded
    sae.list_margin, margins = 4.0, []
    for listed in (600, 251, 250, 250, 250):
        sae.fit_lists(replace(encoded, listed=torch.tensor(listed), capacity=1000))
        margins.append(sae.list_margin)
    assert margins == [4.0, 4.0, 2.0, 1.0, 1.0]
    sae.list_margin = 8.0
    sae.fit_lists(replace(encoded, listed=torch.tensor(60), capacity=1000))
    assert sae.list_margin == 1.0, "not once for each time it was doubled"
    sae.list_margin = 4.0
    sae.fit_lists(encoded)
    assert sae.list_margin == 4.0, "dense products need no room"
