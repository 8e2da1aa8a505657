"""Alignment of decoder columns that fire together, against formulas in float64 (M8).

On a GPU the kernel runs there; elsewhere in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spalf.constraints import coactive_cosine_squared
from tests.helpers_kernels import poisoned_buffers  # noqa: F401 - used by every test

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
SIZES = [(5, 8, 16), (3, 1, 4), (1, 2, 3), (4, 33, 7), (2, 130, 5)]
if ON_GPU:
    SIZES += [(64, 128, 1024), (16, 512, 256), (256, 20, 100)]


def inputs(size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Columns of norms from .5 to 2, and which are active: all, none, one, or some of a token's."""
    tokens, n, _ = size
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(size, generator=generator)
    columns *= (0.5 + 1.5 * torch.rand(tokens, n, 1, generator=generator)) / columns.norm(
        dim=2, keepdim=True
    )
    active = (torch.rand(tokens, n, generator=generator) < 0.6).float()
    for token, count in zip(range(tokens), (n, 0, 1), strict=False):
        active[token] = (torch.arange(n) < count).float()
    return columns.to(DEVICE), active.to(DEVICE)


def found(columns: Tensor, active: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """(mean cos², gradient of three times it)."""
    leaf = columns.clone().requires_grad_()
    mean = coactive_cosine_squared(leaf, active, implementation=implementation)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(3 * mean, leaf)
    return mean.detach(), gradient


def exact(columns: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The same pair by pair, in float64."""
    leaf = columns.double().requires_grad_()
    unit = leaf / leaf.norm(dim=2, keepdim=True)
    squares = (unit @ unit.transpose(1, 2)).square()
    shares = []
    for token, flags in enumerate(active.bool()):
        places = flags.nonzero().flatten()
        if len(places) > 1:
            block = squares[token][places][:, places]
            shares.append(block[~torch.eye(len(places), dtype=torch.bool, device=DEVICE)].mean())
    mean = torch.stack(shares).mean() if shares else 0.0 * leaf.sum()
    (gradient,) = torch.autograd.grad(3 * mean, leaf)
    return mean.detach(), gradient


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_errs_no_more_than_pytorch(size: tuple[int, int, int]) -> None:
    given = inputs(size)
    results = (found(*given, "triton"), found(*given, "reference"), exact(*given))
    for name, kernel, plain, wanted in zip(("mean", "columns"), *results, strict=True):
        scale = wanted.abs().max().clamp_min(1e-3)
        errors = [float((value.double() - wanted).abs().max() / scale) for value in (kernel, plain)]
        assert errors[0] <= 2 * errors[1] + 3e-6, (name, errors)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_tokens_without_a_pair_do_not_count_and_have_no_gradient(implementation: str) -> None:
    columns, active = inputs((5, 8, 16))
    _, gradient = found(columns, active, implementation)
    assert gradient[1:3].eq(0).all()
    assert gradient[0].ne(0).all()
    nothing = found(columns, torch.zeros_like(active), implementation)
    assert nothing[0] == 0 and nothing[1].eq(0).all()


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_what_is_not_active_changes_nothing(implementation: str) -> None:
    columns, active = inputs((5, 8, 16))
    other = torch.where(active.bool().unsqueeze(2), columns, torch.randn_like(columns))
    for before, after in zip(
        found(columns, active, implementation), found(other, active, implementation), strict=True
    ):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_a_column_of_zeros_leaves_everything_finite() -> None:
    columns, active = inputs((1, 8, 16))
    columns[0, 3] = 0.0
    for kernel, plain in zip(
        found(columns, active, "triton"), found(columns, active, "reference"), strict=True
    ):
        assert kernel.isfinite().all() and plain.isfinite().all()
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-6)
