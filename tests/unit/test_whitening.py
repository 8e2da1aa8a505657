from __future__ import annotations

import pytest
import torch

from spalf.errors import UserError
from spalf.whitening import Moments, RunningCovariance, SoftZCA

D_MODEL = 24


def _moments(spectrum: torch.Tensor, seed: int = 0, count: int = 10_000) -> Moments:
    """Moments with the given eigenvalues in a random basis, and a random mean."""
    generator = torch.Generator().manual_seed(seed)
    d_model = spectrum.shape[0]
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator).double()).Q
    mean = torch.randn(d_model, generator=generator).double()
    return Moments(count, mean, (basis * spectrum.double()) @ basis.T)


def _decaying(d_model: int = D_MODEL) -> torch.Tensor:
    return 10.0 ** -torch.linspace(0, 4, d_model)


def _matrix(whitener: SoftZCA) -> torch.Tensor:
    return whitener.apply(torch.eye(whitener.d_model))


@pytest.fixture(params=["full", "low"])
def whitener(request: pytest.FixtureRequest) -> SoftZCA:
    limit = 4096 if request.param == "full" else 0
    return SoftZCA.fit(_moments(_decaying()), 100.0, 0.01, max_full_rank=limit)


def test_i1_inverse_undoes_whitening(whitener: SoftZCA) -> None:
    v = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1))
    gains = (_matrix(whitener).norm(2) * whitener.apply_inverse(torch.eye(D_MODEL)).norm(2)).item()
    tolerance = 4 * torch.finfo(torch.float32).eps * gains
    for there_and_back in (
        whitener.apply_inverse(whitener.apply(v)),
        whitener.apply(whitener.apply_inverse(v)),
    ):
        assert (there_and_back - v).norm(dim=1).max() <= tolerance * v.norm(dim=1).max()


def test_i1_whitener_is_symmetric(whitener: SoftZCA) -> None:
    W = _matrix(whitener)
    torch.testing.assert_close(W, W.T, rtol=0, atol=1e-6 * float(W.abs().max()))
    a, b = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))
    assert float(a @ whitener.apply(b)) == pytest.approx(float(b @ whitener.apply(a)), rel=1e-4)


def test_i1_whitener_is_the_stated_function_of_the_covariance(whitener: SoftZCA) -> None:
    """W (Σ + αI) W = I, with Σ isotropic outside the kept directions."""
    U, lam = whitener.U, whitener.eigenvalues
    outside = torch.eye(D_MODEL).double() - U @ U.T
    sigma = (U * lam) @ U.T + whitener.complement * outside
    W = _matrix(whitener).double()
    ridged = sigma + whitener.alpha * torch.eye(D_MODEL).double()
    torch.testing.assert_close(W @ ridged @ W, torch.eye(D_MODEL).double(), rtol=0, atol=1e-4)


def test_i1_low_rank_with_all_directions_equals_full_rank() -> None:
    """With k = d − 1 the complement is one direction, and its mean eigenvalue its own."""
    moments = _moments(torch.cat([torch.full((D_MODEL - 1,), 2.0), torch.tensor([0.3])]))
    full = SoftZCA.fit(moments, 100.0, 0.01)
    low = SoftZCA.fit(moments, 100.0, 0.01, max_full_rank=0)
    assert low.rank == D_MODEL - 1 and not low.is_full_rank and full.is_full_rank
    assert low.alpha == full.alpha
    v = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(low.whiten(v), full.whiten(v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.apply_inverse(v), full.apply_inverse(v), rtol=1e-5, atol=1e-5)
    every = SoftZCA.fit(moments, 100.0, 1e-9, max_full_rank=0)
    assert every.rank == D_MODEL
    v_full = SoftZCA.fit(moments, 100.0, 1e-9).whiten(v)
    torch.testing.assert_close(every.whiten(v), v_full)


def test_alpha_is_the_eigenvalue_at_the_rank_over_kappa() -> None:
    moments = _moments(torch.tensor([60.0, 30.0, 9.5, 0.4, 0.1]))
    for limit in (4096, 0):
        whitener = SoftZCA.fit(moments, 100.0, 0.01, max_full_rank=limit)
        assert whitener.rank == 3
        assert whitener.alpha == pytest.approx(0.095)
    assert float(whitener.complement) == pytest.approx(0.25)
    assert whitener.U.shape == (5, 3)


def test_rank_when_the_share_is_met_exactly() -> None:
    assert SoftZCA.fit(_moments(torch.ones(4)), 100.0, 0.5).rank in (2, 3)
    assert SoftZCA.fit(_moments(torch.tensor([1.0, 0.0, 0.0])), 100.0, 0.01).rank == 1


def test_low_rank_holds_no_square_matrix() -> None:
    whitener = SoftZCA.fit(_moments(_decaying(200)), 100.0, 0.05, max_full_rank=0)
    assert whitener.rank < 100
    largest = max(t.numel() for t in vars(whitener).values() if isinstance(t, torch.Tensor))
    assert largest == 200 * whitener.rank


def test_whitened_covariance_is_the_ratio_of_eigenvalues() -> None:
    """Var(x̃) along eigenvector i is λ_i/(λ_i + α): 1 where there is signal, 0 where not."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20_000, 4, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 0.01])
    x = x + torch.tensor([5.0, -100.0, 0.0, 1.0])
    running = RunningCovariance(4)
    running.update(x)
    whitener = SoftZCA.fit(running.moments(), 100.0, 0.01)
    after = RunningCovariance(4)
    after.update(whitener.whiten(x))
    lam = torch.linalg.eigvalsh(running.moments().covariance)
    measured = torch.linalg.eigvalsh(after.moments().covariance)
    torch.testing.assert_close(
        measured, (lam / (lam + whitener.alpha)).sort().values, rtol=1e-3, atol=1e-5
    )
    assert after.moments().mean.abs().max() < 1e-4


def test_mahalanobis_is_the_whitened_squared_norm(whitener: SoftZCA) -> None:
    r = torch.randn(2, 3, D_MODEL, requires_grad=True)
    distance = whitener.mahalanobis(r)
    assert distance.shape == (2, 3)
    torch.testing.assert_close(distance, whitener.apply(r).square().sum(-1))
    distance.sum().backward()
    assert r.grad is not None
    torch.testing.assert_close(
        r.grad, 2 * whitener.apply(whitener.apply(r.detach())), rtol=1e-4, atol=1e-3
    )


def test_apply_does_not_centre_and_whiten_does(whitener: SoftZCA) -> None:
    assert whitener.apply(torch.zeros(1, D_MODEL)).abs().max() == 0
    mean = whitener.mean.float()
    assert whitener.whiten(mean).abs().max() == 0


def test_identity_only_centres() -> None:
    mean = torch.tensor([1.0, -2.0, 3.0])
    whitener = SoftZCA.identity(mean)
    x = torch.randn(4, 3)
    assert torch.equal(whitener.whiten(x), x - mean)
    assert torch.equal(whitener.apply(x), x)
    assert torch.equal(whitener.apply_inverse(x), x)
    assert whitener.rank == 0 and whitener.alpha == 0.0


@pytest.mark.parametrize("kind", ["full", "low", "identity"])
def test_tensors_rebuild_the_same_whitener(kind: str) -> None:
    moments = _moments(_decaying())
    original = (
        SoftZCA.identity(moments.mean)
        if kind == "identity"
        else SoftZCA.fit(moments, 100.0, 0.01, max_full_rank=4096 if kind == "full" else 0)
    )
    copy = SoftZCA.from_tensors({**original.tensors(), "anchors": torch.zeros(1)}).to("cpu")
    x = torch.randn(5, D_MODEL)
    assert torch.equal(copy.whiten(x), original.whiten(x))
    assert (copy.rank, copy.alpha) == (original.rank, original.alpha)


def test_frozen() -> None:
    whitener = SoftZCA.identity(torch.zeros(2))
    with pytest.raises(AttributeError):
        whitener.alpha = 1.0  # type: ignore[misc]


def test_output_is_float32_whatever_comes_in(whitener: SoftZCA) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(2, D_MODEL).to(dtype)
        for out in (whitener.whiten(x), whitener.apply(x), whitener.apply_inverse(x)):
            assert out.dtype == torch.float32


def test_singular_covariance_gives_a_finite_whitener() -> None:
    running = RunningCovariance(6)
    running.update(torch.randn(500, 2) @ torch.randn(2, 6))
    for limit in (4096, 0):
        whitener = SoftZCA.fit(running.moments(), 100.0, 0.01, max_full_rank=limit)
        assert (whitener.eigenvalues >= 0).all()
        assert _matrix(whitener).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_activations_are_a_user_error(value: float) -> None:
    running = RunningCovariance(3)
    for _ in range(3):
        running.update(torch.full((64, 3), value))
    with pytest.raises(UserError, match=r"constant over 192 .*dataset") as caught:
        SoftZCA.fit(running.moments(), 100.0, 0.01)
    assert caught.value.key == "hook_point"
    assert "\n" not in str(caught.value)


def test_activations_that_overflow_are_a_user_error() -> None:
    running = RunningCovariance(2)
    running.update(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]))
    with pytest.raises(UserError, match="float32"):
        SoftZCA.fit(running.moments(), 100.0, 0.01)
