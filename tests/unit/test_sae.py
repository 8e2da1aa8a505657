"""The SAE's forward pass, its strata and its initialisation (M3–M6, I2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spalf.config import MethodConfig
from spalf.errors import UserError
from spalf.sae import anchor_directions, initialise
from spalf.sae.init import encoder_rows, free_directions
from spalf.sae.stratified import interquartile_range
from tests.helpers_planted import allocated, correlated, trained_like

KINDS = ("matched_filter", "inverse_whitening")


def r_squared(x: Tensor, x_hat: Tensor) -> float:
    error = (x - x_hat).square().sum(dim=1).mean()
    return float(1 - error / (x - x.mean(dim=0)).square().sum(dim=1).mean())


@pytest.mark.parametrize("encoder_init", KINDS)
@pytest.mark.parametrize("n_anchored", [0, 5])
@pytest.mark.parametrize(("d_model", "d_sae"), [(16, 12), (16, 96), (32, 320)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_i2_reconstruction_is_better_than_the_mean_after_init(
    d_model: int, d_sae: int, n_anchored: int, encoder_init: str, seed: int
) -> None:
    x = correlated(4000, d_model, seed)
    sample, unseen = x[:2000], x[2000:]
    generator = torch.Generator().manual_seed(100 + seed)
    anchors = torch.randn(n_anchored, d_model, generator=generator)
    sae = allocated(sample, d_sae, anchors / anchors.norm(dim=1, keepdim=True))
    report = initialise(
        sae, sample, l0_start=d_sae / 6, c_eps=0.5, encoder_init=encoder_init, seed=seed
    )
    with torch.no_grad():
        on_sample, on_unseen = (r_squared(part, sae(part).x_hat) for part in (sample, unseen))
    assert report.first_explained_variance > 0
    assert on_sample == pytest.approx(report.first_explained_variance, abs=1e-3)
    assert on_unseen > 0


def test_the_fitted_scale_is_the_best_one() -> None:
    """Least squares: any other common factor on encoder and thresholds reconstructs worse."""
    x = correlated(4000, 16, 3)
    sae = trained_like(x, 96, l0=20)
    with torch.no_grad():
        best = sae(x).residual.square().sum()
        for factor in (0.9, 1.1):
            other = trained_like(x, 96, l0=20)
            other.W_enc.mul_(factor)
            other.log_threshold.add_(torch.tensor(factor).log())
            assert other(x).residual.square().sum() > best


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_rows_respond_with_one_to_their_own_direction(kind: str) -> None:
    x = correlated(4000, 16, 0)
    sae = allocated(x, 40)
    directions = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=1, keepdim=True)
    rows = encoder_rows(sae.whitener, directions, kind)
    response = rows @ sae.whitener.whiten(x.mean(dim=0) + directions).T
    base = rows @ sae.whitener.whiten(x.mean(dim=0))
    torch.testing.assert_close(response.diag() - base, torch.ones(40), atol=1e-4, rtol=1e-4)


def test_matched_filter_detects_a_direction_in_noise_better_than_the_raw_projection() -> None:
    """Signal-to-noise of a row for its direction: (row·Wŵ)² / row·WΣW·row, highest for W·ŵ."""
    x = correlated(4000, 16, 0)
    sae = allocated(x, 40)
    directions = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    noise = sae.whitener.whiten(x)
    spread = {
        kind: (noise @ encoder_rows(sae.whitener, directions, kind).T).var(dim=0) for kind in KINDS
    }
    assert (spread["matched_filter"] < spread["inverse_whitening"]).all()


@pytest.mark.parametrize("l0_start", [4.0, 12.0])
def test_thresholds_start_at_the_quantile_that_gives_l0_start(l0_start: float) -> None:
    x = correlated(8000, 16, 1)
    sae = allocated(x, 64)
    report = initialise(sae, x, l0_start=l0_start, c_eps=0.5, encoder_init="matched_filter", seed=0)
    with torch.no_grad():
        l0 = sae(x).l0.mean().item()
    assert report.theta_quantile == pytest.approx(1 - l0_start / 64)
    assert l0 == pytest.approx(l0_start, rel=0.01)


@pytest.mark.parametrize(("n_anchored", "count"), [(0, 5), (0, 40), (5, 6), (5, 40), (16, 8)])
def test_leading_free_directions_are_orthogonal_to_anchors_and_each_other(
    n_anchored: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    anchors = torch.randn(n_anchored, 16, generator=generator)
    free = free_directions(anchors, count, torch.Generator().manual_seed(0))
    leading = free[: min(count, max(0, 16 - n_anchored))]
    assert free.shape == (count, 16)
    torch.testing.assert_close(free.norm(dim=1), torch.ones(count))
    torch.testing.assert_close(leading @ leading.T, torch.eye(len(leading)), atol=1e-5, rtol=0)
    if n_anchored and len(leading):
        assert (leading @ anchors.T).abs().max() < 1e-5
    again = free_directions(anchors, count, torch.Generator().manual_seed(0))
    assert torch.equal(free, again)


def test_anchors_are_the_most_frequent_token_directions_at_unit_norm() -> None:
    directions = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    anchors = anchor_directions(directions, 128, MethodConfig(anchors=True))
    assert anchors.shape == (8, 8), "min(V, F/16)"
    torch.testing.assert_close(anchors.norm(dim=1), torch.ones(8))
    assert torch.nn.functional.cosine_similarity(anchors, directions[:8]).min() > 1 - 1e-6
    assert anchor_directions(directions, 6400, MethodConfig(anchors=True)).shape == (40, 8)
    assert anchor_directions(directions, 128, MethodConfig(anchors=True, v_cap=3)).shape == (3, 8)
    assert anchor_directions(directions, 128, MethodConfig()).shape == (0, 8)


@pytest.mark.parametrize(("v_cap", "tokens", "d_sae"), [(64, 100, 64), (80, 100, 64), (50, 40, 64)])
def test_more_anchors_than_features_or_tokens_is_an_error_that_names_v_cap(
    v_cap: int, tokens: int, d_sae: int
) -> None:
    with pytest.raises(UserError, match=r"^method\.v_cap = \d+: must be at most") as raised:
        anchor_directions(torch.ones(tokens, 8), d_sae, MethodConfig(anchors=True, v_cap=v_cap))
    assert raised.value.value == v_cap


def test_initialised_anchored_columns_are_the_anchors_and_b_dec_is_the_mean() -> None:
    x = correlated(4000, 16, 2)
    sae = trained_like(x, 64, n_anchored=4)
    assert torch.equal(sae.W_dec[:4], torch.eye(16)[:4])
    torch.testing.assert_close(sae.W_dec[4:].norm(dim=1), torch.ones(60))
    torch.testing.assert_close(sae.b_dec * sae.scale, x.mean(dim=0), atol=1e-4, rtol=1e-4)


def test_tangent_projection_touches_only_the_free_stratum() -> None:
    sae = trained_like(correlated(2000, 16, 0), 64, n_anchored=4)
    gradient = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    sae.W_dec.grad = gradient.clone()
    sae.project_gradient()
    assert torch.equal(sae.W_dec.grad[:4], gradient[:4])
    along = (sae.W_dec.grad * sae.W_dec.detach()).sum(dim=1)
    assert along[4:].abs().max() < 1e-5
    removed = gradient - sae.W_dec.grad
    cosine = torch.nn.functional.cosine_similarity(removed[4:], sae.W_dec.detach()[4:])
    torch.testing.assert_close(cosine.abs(), torch.ones(60))  # only the radial part went


def test_projection_without_a_gradient_does_nothing() -> None:
    sae = trained_like(correlated(2000, 16, 0), 64)
    sae.project_gradient()
    assert sae.W_dec.grad is None


def test_normalisation_touches_only_the_free_stratum() -> None:
    sae = trained_like(correlated(2000, 16, 0), 64, n_anchored=4)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    before = sae.W_dec.detach().clone()
    sae.normalise_free_columns()
    assert torch.equal(sae.W_dec[:4], before[:4])
    torch.testing.assert_close(sae.W_dec[4:], before[4:] / 3)


def test_encode_and_decode_are_the_forward_pass() -> None:
    x = correlated(500, 16, 0)
    sae = trained_like(x, 64, n_anchored=4)
    with torch.no_grad():
        out, z = sae(x), sae.encode(x)
        torch.testing.assert_close(sae.decode(z), out.x_hat)
        torch.testing.assert_close(out.residual * sae.scale, x - out.x_hat, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.l0, (z > 0).float().sum(dim=1))
        pre = out.encoded.pre.of(len(x))
        torch.testing.assert_close(z, pre * (pre > sae.threshold))
        below = pre.relu().square() * (pre <= sae.threshold)
        torch.testing.assert_close(out.subthreshold, below.sum(dim=1))
    leading = x.view(5, 100, 16)
    with torch.no_grad():
        torch.testing.assert_close(sae.decode(sae.encode(leading)).view_as(x), out.x_hat)


def test_codes_do_not_depend_on_the_units_of_the_activations() -> None:
    x = correlated(2000, 16, 0)
    one, hundred = trained_like(x, 64), trained_like(100 * x, 64)
    with torch.no_grad():
        large, small = hundred.encode(100 * x), one.encode(x)
        # A pre-activation within rounding of its threshold may fall on either side of it.
        assert (large > 0).eq(small > 0).double().mean() > 0.999
        both = (large > 0) & (small > 0)
        torch.testing.assert_close(large[both], small[both], atol=1e-3, rtol=1e-3)


def test_scaled_thresholds_leave_the_original_untouched_and_share_its_weights() -> None:
    x = correlated(500, 16, 0)
    sae = trained_like(x, 64)
    before = sae.log_threshold.detach().clone()
    view = sae.scaled_thresholds(2.0)
    torch.testing.assert_close(view.threshold, 2 * sae.threshold.detach())
    assert torch.equal(sae.log_threshold, before)
    assert sae.log_threshold.requires_grad
    assert view.W_dec is sae.W_dec
    with torch.no_grad():
        assert 0 < (view.encode(x) > 0).sum() < (sae.encode(x) > 0).sum()
        assert torch.equal(view.encode(x) > 0, sae.pre_activations(x) > view.threshold)


def test_l0_gradient_reaches_the_log_threshold_through_the_exponential() -> None:
    """d E Σ gate / d log θ_j = −θ_j · #(|pre − θ| < ε/2)/ε (M6, rectangle)."""
    x = correlated(500, 16, 0)
    sae = trained_like(x, 64)
    out = sae(x)
    out.l0.sum().backward()
    theta, epsilon = sae.threshold.detach(), sae.bandwidth
    near = ((out.encoded.pre.of(len(x)) - theta).abs() < epsilon / 2).float().sum(dim=0)
    assert near.min() > 0
    torch.testing.assert_close(sae.log_threshold.grad, -theta * near / epsilon)
    assert sae.W_enc.grad is None or not sae.W_enc.grad.any(), "M6: not through pre-activations"


def test_squared_error_has_a_gradient_on_every_parameter() -> None:
    x = correlated(500, 16, 0)
    sae = trained_like(x, 64, n_anchored=4)
    sae(x).residual.square().sum().backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_bandwidth_is_a_share_of_the_interquartile_range() -> None:
    pre = torch.arange(1.0, 101.0).unsqueeze(1) * torch.tensor([1.0, 10.0])
    torch.testing.assert_close(interquartile_range(pre), torch.tensor([50.0, 500.0]))
    sae = trained_like(correlated(500, 16, 0), 64)
    spread = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    sae.refresh_bandwidth(spread, 0.5)
    torch.testing.assert_close(sae.bandwidth, 0.5 * interquartile_range(spread))


def test_how_codes_are_computed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = correlated(64, 12, seed=0)
    sae = trained_like(x, 96)
    sae.kernel = "auto"
    with caplog.at_level("INFO", logger="spalf"):
        for l0 in (50.0, 50.0, 2.0, 2.0):
            sae(x, l0)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "codes by dense products: 52.1% of the entries are active; from 4.2% on dense is faster",
        "codes by lists of active entries in PyTorch: 2.08% of the entries are active",
    ]
