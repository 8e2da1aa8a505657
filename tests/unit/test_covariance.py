from __future__ import annotations

import math

import pytest
import torch

from spalf.whitening import Moments, RunningCovariance, SplitHalfCovariance


def _data(tokens: int, d_model: int = 5, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=generator)
    return x * torch.linspace(0.1, 3.0, d_model) + offset


def _moments_of(x: torch.Tensor, sizes: list[int]) -> Moments:
    running = RunningCovariance(x.shape[1])
    for batch in x.split(sizes):
        running.update(batch)
    return running.moments()


def test_moments_are_those_of_the_whole_stream() -> None:
    x = _data(1000)
    moments = _moments_of(x, [1, 99, 0, 400, 500])
    centred = x.double() - x.double().mean(0)
    assert moments.count == 1000
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    torch.testing.assert_close(moments.covariance, centred.T @ centred / 1000)
    assert moments.variance == pytest.approx(float(centred.square().sum()) / 1000)


def test_offset_of_a_million_deviations_costs_no_accuracy() -> None:
    x = _data(2000).double()
    far = _moments_of(x + 1e6, [500] * 4)
    torch.testing.assert_close(
        far.covariance, _moments_of(x, [2000]).covariance, rtol=1e-6, atol=1e-8
    )


def test_known_covariance_of_two_points() -> None:
    moments = _moments_of(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), [1, 1])
    torch.testing.assert_close(moments.mean, torch.tensor([2.0, 2.0], dtype=torch.float64))
    expected = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(moments.covariance, expected)


def test_update_rejects_another_width() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        RunningCovariance(5).update(torch.zeros(3, 4))


def test_no_data_has_no_moments_and_an_infinite_error() -> None:
    split = SplitHalfCovariance(3)
    assert split.error() == math.inf
    with pytest.raises(ValueError, match="no activations"):
        split.merged()
    split.update(_data(10, 3))
    assert split.error() == math.inf and not split.converged(0.5)


def test_split_half_merges_to_the_whole_stream() -> None:
    x = _data(900)
    split = SplitHalfCovariance(5)
    for batch in x.split(100):
        split.update(batch)
    whole = _moments_of(x, [900])
    assert split.count == split.merged().count == 900
    torch.testing.assert_close(split.merged().mean, whole.mean)
    torch.testing.assert_close(split.merged().covariance, whole.covariance)


def test_split_half_error_is_the_sampling_error() -> None:
    """For standard normal data E‖Σ_a−Σ_b‖²_F = 4(d²+d)/n, and ‖Σ‖²_F = d."""
    n, d_model = 20_000, 8
    x = torch.randn(n, d_model, generator=torch.Generator().manual_seed(1))
    split = SplitHalfCovariance(d_model)
    for batch in x.split(500):
        split.update(batch)
    expected = math.sqrt(4 * (d_model**2 + d_model) / n / d_model)
    assert split.error() == pytest.approx(expected, rel=0.35)
    assert split.converged(2 * expected) and not split.converged(expected / 3)


def test_split_half_error_does_not_shrink_when_data_repeats_unequally() -> None:
    """A successive-difference gate would pass here; the halves keep their difference."""
    split = SplitHalfCovariance(5)
    first, second = _data(50, seed=1), _data(50, seed=2)
    for _ in range(20):
        split.update(first)
        split.update(second)
    once = SplitHalfCovariance(5)
    once.update(first)
    once.update(second)
    assert split.error() == pytest.approx(once.error(), rel=1e-9)


def test_resumed_statistics_are_bit_identical() -> None:
    batches = list(_data(700).split(100))
    straight, before, after = (SplitHalfCovariance(5) for _ in range(3))
    for batch in batches:
        straight.update(batch)
    for batch in batches[:3]:
        before.update(batch)
    saved = before.state_dict()
    before.update(batches[3] * 9)  # what was saved must be a copy
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    after.load_state_dict(saved)
    for batch in batches[3:]:
        after.update(batch)
    assert straight.error() == after.error()
    assert torch.equal(straight.merged().covariance, after.merged().covariance)
    assert torch.equal(straight.merged().mean, after.merged().mean)


def test_state_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="d_model = 4"):
        SplitHalfCovariance(5).load_state_dict(SplitHalfCovariance(4).state_dict())
