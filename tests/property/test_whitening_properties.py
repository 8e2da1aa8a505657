from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spalf.whitening import Moments, RunningCovariance, SoftZCA

seeds = st.integers(0, 2**31 - 1)


def _sample(seed: int, tokens: int, d_model: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, d_model, generator=generator, dtype=torch.float64)
    return noise @ mixing + torch.randn(d_model, generator=generator, dtype=torch.float64)


def _moments(x: torch.Tensor) -> Moments:
    running = RunningCovariance(x.shape[1])
    running.update(x)
    return running.moments()


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(1, 6),
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_merge_order_is_irrelevant(seed: int, d_model: int, sizes: list[int], random) -> None:
    sizes = [*sizes, 5]
    x = _sample(seed, sum(sizes), d_model)
    parts = []
    for batch in x.split(sizes):
        part = RunningCovariance(d_model)
        part.update(batch)
        parts.append(part)
    random.shuffle(parts)
    merged = RunningCovariance(d_model)
    for part in parts:
        merged.merge(part)
    expected = _moments(x)
    assert merged.count == expected.count
    torch.testing.assert_close(merged.moments().mean, expected.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        merged.moments().covariance, expected.covariance, rtol=1e-9, atol=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 6), st.floats(-1e3, 1e3), st.booleans())
def test_whitening_does_not_see_a_shift(seed: int, d: int, shift: float, low_rank: bool) -> None:
    x = _sample(seed, 200, d)
    limit = 0 if low_rank else 4096
    here = SoftZCA.fit(_moments(x), 100.0, 0.1, max_full_rank=limit)
    there = SoftZCA.fit(_moments(x + shift), 100.0, 0.1, max_full_rank=limit)
    # Exactly representable, so that the float32 inputs differ by the shift alone.
    y = (_sample(seed + 1, 10, d) * 8).round() / 8
    moved = there.apply(y - there.mean + shift)
    torch.testing.assert_close(here.apply(y - here.mean), moved, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 6), st.floats(0.1, 10.0), st.booleans())
def test_whitened_output_does_not_see_the_scale(
    seed: int, d: int, scale: float, low_rank: bool
) -> None:
    """α follows the spectrum, so activations in other units whiten to the same numbers."""
    x = _sample(seed, 200, d)
    limit = 0 if low_rank else 4096
    plain = SoftZCA.fit(_moments(x), 100.0, 0.1, max_full_rank=limit)
    scaled = SoftZCA.fit(_moments(x * scale), 100.0, 0.1, max_full_rank=limit)
    torch.testing.assert_close(plain.whiten(x), scaled.whiten(x * scale), rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 8), st.floats(1.0, 1e4), st.floats(1e-3, 0.9), st.booleans())
def test_i1_whitening_inverse(
    seed: int, d: int, kappa: float, delta_rank: float, low_rank: bool
) -> None:
    x = _sample(seed, 50, d)
    limit = 0 if low_rank else 4096
    whitener = SoftZCA.fit(_moments(x), kappa, delta_rank, max_full_rank=limit)
    condition = ((whitener.eigenvalues[0] + whitener.alpha) / whitener.alpha) ** 0.5
    back = whitener.apply_inverse(whitener.apply(x))
    error = (back - x.float()).norm(dim=1) / x.float().norm(dim=1)
    assert error.max() <= 16 * torch.finfo(torch.float32).eps * float(condition)
