"""The Fisher information at a site and the faithfulness metric made from it (M8)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from spalf.activations import fisher_information
from spalf.checkpoint import read_checkpoint
from spalf.constraints import fisher_factor
from spalf.constraints.metric import FISHER_SHARE
from spalf.errors import UserError
from spalf.kernels import squared_errors
from spalf.steps.calibrate import calibration_settings, load_calibration
from spalf.steps.initialise import initialise_step
from spalf.training.state import load_sae
from tests.helpers_planted import (
    D_MODEL,
    PlantedModel,
    context,
    correlated,
    planted_config,
    stream,
    write_calibration,
)


def of_a_linear_model(model: PlantedModel, tokens: Tensor) -> Tensor:
    """E[W(diag p − ppᵀ)Wᵀ]; a position's error reaches no other, and the last predicts nothing."""
    p = model.logits(tokens)[:, :-1].double().flatten(0, 1).softmax(dim=-1)
    variance = torch.diag(p.mean(dim=0)) - p.T @ p / len(p)
    W = model.W_U.double()
    return W @ variance @ W.T * (tokens.shape[1] - 1) / tokens.shape[1]


def test_fisher_information_of_a_linear_model_is_the_covariance_of_its_logits() -> None:
    model = PlantedModel()
    model.W_U *= 0.2  # not so sure of one token that most draws are the same
    tokens = stream(2048, 0).sequences(0, 2048, seed=0)
    found = fisher_information(model, tokens.split(256))
    expected = of_a_linear_model(model, tokens)
    assert torch.equal(found, found.T)
    assert float((found - expected).norm() / expected.norm()) < 0.05


class TwoPositions(PlantedModel):
    """The second prediction sees the sum of both activations, the first its own."""

    def patched_logits(self, tokens: Tensor, patch: Any) -> Tensor:
        return patch(self.activations(tokens)).cumsum(dim=1) @ self.W_U


def test_an_error_counts_wherever_it_is_seen_later() -> None:
    """At the first of three positions both predictions that count depend on the activation."""
    model = TwoPositions()
    model.W_U *= 0.1
    tokens = stream(8192, 0, 3).sequences(0, 8192, seed=0)
    found = fisher_information(model, tokens.split(1024))
    p = model.patched_logits(tokens, lambda x: x).double().softmax(dim=-1)
    W = model.W_U.double()
    once = [W @ (torch.diag(q.mean(dim=0)) - q.T @ q / len(q)) @ W.T for q in (p[:, 0], p[:, 1])]
    expected = (once[0] + 2 * once[1]) / 3
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_fisher_information_follows_its_seed_and_no_global_generator() -> None:
    model, tokens = PlantedModel(), stream(64, 0).sequences(0, 64, seed=0)
    torch.manual_seed(1)
    one = fisher_information(model, [tokens])
    torch.manual_seed(2)
    assert torch.equal(one, fisher_information(model, [tokens]))
    assert not torch.equal(one, fisher_information(model, [tokens], seed=1))


def test_predictions_that_overflow_give_no_number_and_no_error() -> None:
    model, tokens = PlantedModel(), stream(64, 0).sequences(0, 64, seed=0)
    model.W_U[:, 3] = torch.inf
    assert fisher_information(model, tokens.split(16)).isnan().all()


def a_fisher(d: int = 16) -> Tensor:
    """Positive definite, in a small unit, with a spectrum over three decades."""
    spread = torch.logspace(-2, 1, d, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(
        torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    return 1e-3 * rotation * spread @ rotation.T


def test_the_factor_gives_half_the_squared_norm_and_half_the_fisher_information() -> None:
    fisher = a_fisher()
    covariance = torch.cov(correlated(5000, 16, 0).double().T)
    factor = fisher_factor(fisher, covariance)
    share = float(covariance.trace() / (fisher @ covariance).trace())
    r = torch.randn(7, 16, dtype=torch.float64)
    expected = (1 - FISHER_SHARE) * r.square().sum(dim=1)
    expected += FISHER_SHARE * share * torch.einsum("bi,ij,bj->b", r, fisher, r)
    error, mse = squared_errors(-r, torch.zeros_like(r), 1.0, factor.double(), torch.float64)
    torch.testing.assert_close(mse, r.square().sum(dim=1).mean())
    torch.testing.assert_close(error, expected.mean(), rtol=1e-5, atol=0)


def test_the_error_and_its_gradient_in_bfloat16_are_those_of_float32() -> None:
    covariance = torch.cov(correlated(5000, 16, 0).double().T)
    factor = fisher_factor(a_fisher(), covariance)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        r = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        error, _ = squared_errors(-r, torch.zeros_like(r), 1.0, factor, dtype)
        assert error.dtype == torch.float32
        found.append((error.detach(), torch.autograd.grad(error, r)[0]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-3, atol=0)
    assert float((found[1][1] - found[0][1]).norm() / found[0][1].norm()) < 1e-2


def test_the_metric_leaves_the_variance_of_the_activations_as_it_is() -> None:
    """tr MΣ = tr Σ, whatever the unit of G."""
    covariance = torch.cov(correlated(5000, 16, 0).double().T)
    for unit in (1e-6, 1.0, 1e6):
        factor = fisher_factor(unit * a_fisher(), covariance).double()
        variance = torch.trace(factor @ factor.T @ covariance)
        assert float(variance / covariance.trace()) == pytest.approx(1.0, rel=1e-6)


def test_an_isotropic_fisher_information_gives_the_euclidean_error() -> None:
    covariance = torch.cov(correlated(5000, 16, 0).double().T)
    factor = fisher_factor(3e-4 * torch.eye(16, dtype=torch.float64), covariance)
    torch.testing.assert_close(factor, torch.eye(16), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fisher", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_predictions_that_ignore_the_site_are_an_error(fisher: Tensor) -> None:
    with pytest.raises(UserError, match=r"method\.metric = 'fisher'.*use euclidean"):
        fisher_factor(fisher.double(), torch.eye(4, dtype=torch.float64))


def test_calibration_keeps_it_and_init_makes_the_factor_where_it_is_needed(tmp_path: Path) -> None:
    cpu, default = torch.device("cpu"), planted_config()
    calibration = write_calibration(default, tmp_path / "calibration")
    known = load_calibration(calibration, default, cpu)
    for metric in ("fisher", "euclidean"):
        config = planted_config(method={"metric": metric})
        initialise_step(config, calibration, tmp_path / metric, context())
        sae = load_sae(read_checkpoint(tmp_path / metric), config, cpu)
        if metric == "euclidean":
            assert sae.metric_factor is None
            continue
        assert sae.metric_factor is not None
        torch.testing.assert_close(
            sae.metric_factor, fisher_factor(known.fisher, known.covariance), rtol=0, atol=0
        )


def test_every_metric_shares_a_calibration() -> None:
    settings = [
        calibration_settings(planted_config(method={"metric": metric}))
        for metric in ("euclidean", "mahalanobis", "fisher")
    ]
    assert settings[0] == settings[1] == settings[2]


def test_predictions_that_overflow_stop_init_and_only_with_this_metric(tmp_path: Path) -> None:
    config = planted_config()
    overflow = torch.full((D_MODEL, D_MODEL), torch.nan)
    step = import_module("spalf.steps.calibrate")
    with mock.patch.object(step, "_fisher", lambda *_: overflow):
        calibration = write_calibration(config, tmp_path / "calibration")
    with pytest.raises(UserError, match=r"method\.metric = 'fisher'.*use euclidean"):
        initialise_step(config, calibration, tmp_path / "fisher", context())
    euclidean = planted_config(method={"metric": "euclidean"})
    initialise_step(euclidean, calibration, tmp_path / "euclidean", context())
