"""The Triton kernels on a real device, at sizes the interpreter is too slow for (M4, M6, I3).

Needs torch, triton and pytest only, so that it runs on machines where little else is installed.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spalf.kernels import choose, jumprelu
from tests.helpers_kernels import poisoned_buffers  # noqa: F401 - used by every test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU here"
    ),
]

DEVICE = "cuda"
SURROGATES = ["rectangle", "moreau"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 32_768), (4_096, 8_192), (1_000, 4_099), (127, 65_537), (4_097, 1)]
FIELDS = ("z", "l0", "sub", "d_pre", "d_threshold")


class Case(NamedTuple):
    """Inputs of one call and the gradients that come back to it."""

    pre: Tensor
    threshold: Tensor
    bandwidth: Tensor
    surrogate: str
    back: tuple[Tensor, Tensor, Tensor]


def make_case(
    shape: tuple[int, int],
    dtype: torch.dtype,
    surrogate: str,
    regime: str = "mixed",
    seed: int = 0,
) -> Case:
    """Values on a grid of 1/64, exact in bfloat16, so that ties and window edges do occur."""
    rows, columns = shape
    generator = torch.Generator(DEVICE).manual_seed(rows + columns + seed)

    def grid(*size: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, device=DEVICE) / 64

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    threshold = grid(columns, low=1, high=128)
    pre = grid(rows, columns, low=-256, high=256)
    if regime == "ties":
        pre = torch.where(noise(rows, columns) < 0.5, threshold, pre)
    shift = {"all dead": 50, "all active": -50}.get(regime, 0)
    return Case(
        pre=pre.to(dtype),
        threshold=threshold + shift,
        bandwidth=2 * grid(columns, low=0, high=64),
        surrogate=surrogate,
        back=(noise(rows, columns).to(dtype), noise(rows), noise(rows)),
    )


def formulas(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients written straight from M4 and M6, computed in ``dtype``."""
    pre, theta, epsilon = (tensor.to(dtype) for tensor in case[:3])
    dz, dl0, dsub = case.back[0].to(dtype), case.back[1][:, None], case.back[2][:, None]
    gate = (pre > theta).to(dtype)
    positive = pre.clamp(min=0)
    u = pre - theta
    if case.surrogate == "rectangle":
        weight = torch.where(u.abs() < epsilon / 2, 1 / epsilon, 0)
    else:
        weight = torch.where((u > 0) & (u < epsilon), u / (epsilon**2 / 2), 0)
    return {
        "z": pre * gate,
        "l0": gate.sum(1),
        "sub": (positive**2 * (1 - gate)).sum(1),
        "d_pre": dz * gate + dsub.to(dtype) * 2 * positive * (1 - gate),
        "d_threshold": -((dz * theta + dl0.to(dtype) - dsub.to(dtype) * theta**2) * weight).sum(0),
    }


def call(case: Case, implementation: str) -> dict[str, Tensor]:
    inputs = [case.pre.clone().requires_grad_(), case.threshold.clone().requires_grad_()]
    outputs = jumprelu(*inputs, case.bandwidth, case.surrogate, implementation=implementation)
    gradients = torch.autograd.grad(outputs, inputs, case.back)
    found = [tensor.detach() for tensor in (*outputs, *gradients)]
    return dict(zip(FIELDS, found, strict=True))


def errors(found: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Per field: [error, what PyTorch's own arithmetic errs, one last place of the largest value].

    All are maxima over a tensor against float64. PyTorch's own: for z and d_pre the exact value
    rounded once to the type of ``pre``, for the sums the same formula in float32.
    """
    exact = formulas(case, torch.float64)
    native = formulas(case, torch.float32)
    measured = {}
    for name in FIELDS:
        elementwise = name in ("z", "d_pre")
        kept = case.pre.dtype if elementwise else torch.float32
        assert found[name].dtype == kept
        rounded = (exact if elementwise else native)[name].to(kept).double()
        measured[name] = torch.stack(
            [
                (found[name].double() - exact[name]).abs().max(),
                (rounded - exact[name]).abs().max(),
                torch.finfo(kept).eps * exact[name].abs().max(),
            ]
        )
    return measured


def assert_as_good_as_native(case: Case, implementation: str, *more: Case) -> None:
    """No error above twice PyTorch's own plus one last place, each the largest over the cases.

    The error of a single sum is one draw and may be next to nothing by luck, so a case with few
    sums is no yardstick on its own: give several.
    """
    measured = [errors(call(each, implementation), each) for each in (case, *more)]
    for name in FIELDS:
        error, native, ulp = torch.stack([each[name] for each in measured]).amax(0).tolist()
        allowed = 2 * native + ulp
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_auto_takes_triton_for_a_cuda_tensor() -> None:
    choice = choose(torch.empty(1, device=DEVICE))
    assert choice.implementation == "triton"
    assert "CUDA" in choice.reason


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_float64(
    shape: tuple[int, int], dtype: torch.dtype, surrogate: str, implementation: str
) -> None:
    draws = 16 if shape[1] == 1 else 1
    cases = [make_case(shape, dtype, surrogate, seed=seed) for seed in range(draws)]
    assert_as_good_as_native(cases[0], implementation, *cases[1:])


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["ties", "all dead", "all active"])
def test_edge_regimes_match_float64(regime: str, dtype: torch.dtype, surrogate: str) -> None:
    case = make_case((1_031, 2_049), dtype, surrogate, regime)
    assert_as_good_as_native(case, "triton")


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_i3_kernel_agrees_with_reference(dtype: torch.dtype, surrogate: str) -> None:
    case = make_case((2_000, 5_000), dtype, surrogate, "ties")
    kernel, reference = call(case, "triton"), call(case, "reference")
    assert torch.equal(kernel["z"], reference["z"])
    assert torch.equal(kernel["l0"], reference["l0"])
    torch.testing.assert_close(
        kernel["d_pre"], reference["d_pre"], rtol=torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_identical(dtype: torch.dtype) -> None:
    case = make_case((4_096, 8_192), dtype, "rectangle")
    first, second = call(case, "triton"), call(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in FIELDS)


def test_offsets_beyond_32_bits() -> None:
    """2³¹ + 2¹⁶ elements: the last row lies where a 32-bit offset would have wrapped around."""
    rows, columns = 2**15 + 1, 2**16
    pre = torch.zeros((rows, columns), dtype=torch.bfloat16, device=DEVICE)
    pre[-1] = 2
    pre.requires_grad_()
    threshold = torch.ones(columns, device=DEVICE, requires_grad=True)
    torch.use_deterministic_algorithms(False)  # poisoning gigabytes would only cost time
    z, l0, _ = jumprelu(pre, threshold, torch.full_like(threshold, 4.0))
    (z[-1].float().sum() + l0.sum()).backward()
    assert pre.grad is not None and threshold.grad is not None
    assert l0[-1] == columns and not l0[:-1].any()
    assert (z[-1] == 2).all() and (pre.grad[-1] == 1).all() and not pre.grad[:-1].any()
    # Every row is within the window of width 4; the last one also carries dz·θ = 1.
    torch.testing.assert_close(threshold.grad, torch.full_like(threshold, -(rows + 1) / 4))
