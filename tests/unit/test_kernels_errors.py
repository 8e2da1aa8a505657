"""Errors of a reconstruction in a metric, against formulas in float64 (M8).

On a GPU the kernels run there; elsewhere in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spalf.kernels import squared_errors
from tests.helpers_kernels import poisoned_buffers  # noqa: F401 - used by every test

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
SIZES = [(9, 24), (1, 8), (5, 33), (3, 1100)]
if ON_GPU:
    SIZES += [(4096, 256), (1000, 1030), (1, 4096)]
SCALE = 3.0
ROUNDING = 4e-3 if ON_GPU else 1.2e-2
"""Of bfloat16, which the interpreter truncates where the hardware rounds to nearest."""


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, x, R)."""
    generator = torch.Generator().manual_seed(0)
    rows, width = size
    x_hat, x = (torch.randn(rows, width, generator=generator).to(DEVICE) for _ in range(2))
    mixed = torch.randn(width, width, generator=generator).to(DEVICE) / width**0.5
    return x_hat, SCALE * x, torch.eye(width, device=DEVICE) + 0.3 * mixed.tril()


def errors(
    size: tuple[int, int], with_factor: bool, dtype: torch.dtype, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(error, mse, gradient of x̂ of three times the error)."""
    x_hat, x, factor = inputs(size)
    leaf = x_hat.requires_grad_()
    found = squared_errors(
        leaf, x, SCALE, factor if with_factor else None, dtype,
        implementation=implementation,  # type: ignore[arg-type]
    )  # fmt: skip
    assert not found[1].requires_grad
    (gradient,) = torch.autograd.grad(3 * found[0], leaf)
    return found[0].detach(), found[1], gradient


def exact(size: tuple[int, int], with_factor: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the formulas, in float64."""
    x_hat, x, factor = (t.double() for t in inputs(size))
    residual = x / SCALE - x_hat
    metric = factor @ factor.T if with_factor else torch.eye(size[1], device=DEVICE).double()
    error = (residual @ metric * residual).sum(1).mean()
    return error, residual.square().sum(1).mean(), -6 / size[0] * residual @ metric


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest error, as a share of the largest exact value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("with_factor", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_err_no_more_than_pytorch(size: tuple[int, int], with_factor: bool) -> None:
    for dtype, slack in ((torch.float32, 2e-6), (torch.bfloat16, ROUNDING)):
        wanted = exact(size, with_factor)
        kernels = errors(size, with_factor, dtype, "triton")
        plain = errors(size, with_factor, dtype, "reference")
        for name, k, p, w in zip(("error", "mse", "x_hat"), kernels, plain, wanted, strict=True):
            assert k.dtype == torch.float32
            assert distance(k, w) <= 2 * distance(p, w) + slack, (name, dtype)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_plain_error_is_float32_whatever_the_operands(implementation: str) -> None:
    one, two = (
        errors((9, 24), True, dtype, implementation) for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], two[0])


def test_a_second_pass_repeats_the_first_bit_for_bit() -> None:
    first, second = (errors(SIZES[-1], True, torch.bfloat16, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_nan_in_the_reconstruction_is_seen(implementation: str) -> None:
    x_hat, x, factor = inputs((5, 33))
    x_hat[2, 1] = float("nan")
    found = squared_errors(
        x_hat, x, SCALE, factor, implementation=implementation,  # type: ignore[arg-type]
    )  # fmt: skip
    assert found[0].isnan()
    assert found[1].isnan()


@pytest.mark.parametrize("with_factor", [True, False])
def test_the_gradient_is_float32_whatever_the_operands(with_factor: bool) -> None:
    """Multiplied with its slope in bfloat16 it would be rounded once more."""
    gradient = errors((9, 24), with_factor, torch.bfloat16, "triton")[2]
    assert gradient.dtype == torch.float32
    if ON_GPU or not with_factor:
        assert not torch.equal(gradient, gradient.bfloat16().float())
