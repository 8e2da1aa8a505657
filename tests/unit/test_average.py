"""The mean of the weights that Phase 2 ends with (M16)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spalf.activations import ActivationStore
from spalf.config import RunConfig, schedule
from spalf.sae import StratifiedSAE
from spalf.training.average import WeightAverage
from spalf.training.loop import Hooks, PhaseRun
from spalf.training.phase import enter_phase_two, phase_two
from spalf.training.state import PARAMETERS, TrainState
from tests.helpers_planted import (
    PlantedModel,
    correlated,
    planted_config,
    run_phases,
    stream,
    trained_like,
    write_calibration,
)
from tests.unit.test_training_phases import state_for

KEPT, FROZEN = torch.tensor(0.0), torch.tensor(1.0)


def with_weights(sae: StratifiedSAE, value: float) -> StratifiedSAE:
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.fill_(value)
    return sae


def test_the_mean_counts_every_weight_once_and_none_of_a_frozen_run() -> None:
    sae = trained_like(correlated(500, 16, 0), 32)
    average = WeightAverage.of_nothing(sae)
    for value, frozen in ((1.0, KEPT), (100.0, FROZEN), (2.0, KEPT), (6.0, KEPT), (9.0, FROZEN)):
        average.add(with_weights(sae, value), unless=frozen)
    assert float(average.count) == 3
    assert average.means.keys() == set(PARAMETERS)
    for name, mean in average.means.items():
        torch.testing.assert_close(mean, torch.full_like(mean, 3.0), msg=name)


def test_weights_that_are_not_finite_do_not_reach_the_mean_of_a_frozen_run() -> None:
    sae = with_weights(trained_like(correlated(500, 16, 0), 32), 2.0)
    average = WeightAverage.of_nothing(sae)
    average.add(sae, unless=FROZEN)
    assert not any(mean.any() for mean in average.means.values())


def test_put_into_an_sae_the_free_columns_are_of_norm_one_again() -> None:
    sae = trained_like(correlated(500, 16, 0), 32, n_anchored=3)
    average = WeightAverage.of_nothing(sae)
    average.add(sae, unless=KEPT)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.roll(1, dims=1))
    average.add(sae, unless=KEPT)
    average.put_into(sae)
    norms = sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms[3:], torch.ones(29))
    assert (norms[:3] < 0.999).all(), "anchored columns are the mean itself"
    torch.testing.assert_close(sae.W_enc.detach(), average.means["W_enc"])


def test_it_is_rebuilt_from_its_tensors() -> None:
    sae = trained_like(correlated(500, 16, 0), 32)
    one = WeightAverage.of_nothing(sae)
    one.add(sae, unless=KEPT)
    other = WeightAverage.from_tensors({n: t.clone() for n, t in one.tensors().items()})
    for average in (one, other):
        average.add(with_weights(sae, 0.5), unless=KEPT)
    for name, value in one.tensors().items():
        assert torch.equal(value, other.tensors()[name]), name


def in_phase_two(config: RunConfig) -> tuple[PhaseRun, TrainState]:
    store = ActivationStore(PlantedModel(), stream(4096, 0))
    state = state_for(config, trained_like(store.harvest(0, 256), config.F), 0.7)
    enter_phase_two(state, config, store)
    phase = phase_two(config, store, state.sae, state.phase1_end)
    hooks = Hooks(lambda row: None, lambda state: None, lambda step: False, lambda: False)
    return PhaseRun(state, phase, config, hooks), state


def test_it_is_the_mean_over_the_second_half_of_phase_two() -> None:
    config = planted_config(400)
    steps = schedule(config).phase2_steps
    assert steps == 4 * 12
    run, state = in_phase_two(config)
    seen: list[dict[str, Tensor]] = []
    while not run.done:
        run.advance()
        seen.append({name: p.detach().clone() for name, p in state.sae.named_parameters()})
    assert state.average is not None
    assert float(state.average.count) == 24
    for name, mean in state.average.means.items():
        expected = torch.stack([weights[name] for weights in seen[24:]]).mean(dim=0)
        torch.testing.assert_close(mean, expected, msg=name)
        assert not torch.equal(mean, seen[-1][name]), name


def test_without_averaging_the_last_weights_stay() -> None:
    config = planted_config(400, method={"averaging": False})
    run, state = in_phase_two(config)
    while not run.done:
        run.advance()
    assert run.phase.average_from is None
    assert state.average is None


@pytest.mark.parametrize("averaging", [True, False])
def test_a_result_is_the_mean_and_keeps_no_other(averaging: bool, tmp_path: Path) -> None:
    """Both runs take the same steps; their results differ, unless nothing was averaged."""
    plain = planted_config(400, method={"averaging": False})
    calibration = write_calibration(plain, tmp_path / "calibration")
    results = {}
    for name, own in (("plain", False), ("other", averaging)):
        config = planted_config(400, method={"averaging": own})
        run = run_phases(config, calibration, tmp_path / name)
        results[name] = run.checkpoint("phase2").tensors
        assert not any("average" in key for key in results[name]["optimizer"])
    for name in ("W_enc", "W_dec"):
        one, other = (results[run]["model"][name] for run in ("plain", "other"))
        assert torch.equal(one, other) != averaging, name
    moments = [results[run]["optimizer"]["W_enc.exp_avg"] for run in ("plain", "other")]
    assert torch.equal(*moments)
