"""Constraints and the augmented Lagrangian against hand-computed values (M7, M8, M10)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spalf.constraints import (
    blended_error,
    coactive_cosine_squared,
    drift_violation,
    faithfulness_violation,
    orthogonality_violation,
)
from spalf.kernels import strongest_features
from spalf.lagrangian import augmented_lagrangian, psi, sparsity_objective


def test_faithfulness_is_the_log_of_the_relative_excess() -> None:
    g = faithfulness_violation(torch.tensor(3.0), torch.tensor(math.log(2.0)))
    assert g.item() == pytest.approx(math.log(1.5))


def test_blended_error_equals_mse_at_the_exchange_rate_of_entry() -> None:
    mse, kl = torch.tensor(5.0), torch.tensor(0.25)
    assert blended_error(mse, kl, mse / kl).item() == pytest.approx(5.0)
    assert blended_error(mse, kl / 2, mse / kl).item() == pytest.approx(3.75)


def test_drift_is_zero_at_the_tolerance_and_minus_one_at_home() -> None:
    anchors = torch.eye(3, 8)
    assert drift_violation(anchors, anchors, 0.1).item() == pytest.approx(-1.0)
    moved = anchors * 1.1
    assert drift_violation(moved, anchors, 0.1).item() == pytest.approx(0.0, abs=1e-5)


def mean_cosine(z: Tensor, W_dec: Tensor, max_active: int) -> Tensor:
    features, active = strongest_features(z, max_active)
    return coactive_cosine_squared(W_dec[features], active)


def test_drift_without_anchors_is_feasible() -> None:
    empty = torch.zeros(0, 8, requires_grad=True)
    assert drift_violation(empty, empty.detach(), 0.1).item() == -1.0


def test_coactive_cosine_counts_only_pairs_that_fire_together() -> None:
    W_dec = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # Token 0 fires {0, 1} at 45°, token 1 fires {0, 2} at 90°, token 2 has no pair.
    z = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0], [0.0, 5.0, 0.0]])
    assert mean_cosine(z, W_dec, 3).item() == pytest.approx((0.5 + 0.0) / 2)


def test_random_directions_sit_at_one_third_of_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    d_model = 64
    W_dec = torch.randn(400, d_model, generator=generator)
    z = (torch.rand(64, 400, generator=generator) < 0.1).float()
    mean = mean_cosine(z, W_dec, 100)
    assert orthogonality_violation(mean, d_model, 3.0).item() == pytest.approx(-2 / 3, abs=0.02)


def test_i4_every_violated_constraint_has_a_gradient() -> None:
    anchors = torch.eye(2, 4)
    W_dec = torch.cat([anchors * 1.5, torch.ones(3, 4)]).requires_grad_()
    z = torch.ones(2, 5)
    drift = drift_violation(W_dec[:2], anchors, 0.1)
    ortho = orthogonality_violation(mean_cosine(z, W_dec, 5), 4, 1.0)
    error = (z @ W_dec).square().sum()
    faith = faithfulness_violation(error, torch.tensor(0.0))
    for violation in (drift, ortho, faith):
        assert violation.item() > 0
        zero, one = torch.zeros(1), torch.ones(1)
        loss = augmented_lagrangian(torch.zeros(()), violation.reshape(1), zero, one)
        (gradient,) = torch.autograd.grad(loss, W_dec, retain_graph=True)
        assert gradient.abs().max() > 1e-4


def test_i5_psi_is_continuously_differentiable_and_not_positive_when_feasible() -> None:
    for y in (0.0, 0.5, 3.0):
        g = torch.linspace(-3, 3, 2001, dtype=torch.float64, requires_grad=True)
        value = psi(g, torch.full_like(g, y))
        (slope,) = torch.autograd.grad(value.sum(), g)
        assert torch.allclose(slope, (2 * g + y).clamp_min(0))
        assert value.diff().abs().max() < 0.05, "a jump in the value"
        assert slope.diff().abs().max() < 0.01, "a jump in the slope"
        assert (value[g <= 0] <= 1e-12).all()


def test_lagrangian_gradient_is_the_shifted_violation() -> None:
    g = torch.tensor([0.2, -0.3, -0.01], dtype=torch.float64, requires_grad=True)
    multipliers = torch.tensor([1.0, 0.1, 0.5], dtype=torch.float64)
    rho = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    augmented_lagrangian(torch.zeros((), dtype=torch.float64), g, multipliers, rho).backward()
    expected = (2 * rho * g.detach() + multipliers).clamp_min(0)
    assert torch.allclose(g.grad, expected)
    assert g.grad[1] == 0, "a constraint that holds with room to spare must not pull"


def test_objective_is_one_at_the_reference() -> None:
    l0, mass = torch.full((4,), 12.0), torch.full((4,), 6.0)
    plain = sparsity_objective(l0, mass, l0_ref=12.0, lambda_disc=0.0, d_model=3)
    full = sparsity_objective(l0, mass, l0_ref=12.0, lambda_disc=0.5, d_model=3)
    assert plain.item() == pytest.approx(1.0)
    assert full.item() == pytest.approx(2.0)
