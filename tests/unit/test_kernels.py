"""JumpReLU, reference and Triton kernel alike, against closed formulas in float64 (M4, M6, I3).

Without a GPU the kernels run in Triton's interpreter, which `tests/conftest.py` switches on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spalf.errors import UserError
from spalf.kernels import choose, jumprelu
from tests.helpers_kernels import poisoned_buffers  # noqa: F401 - used by every test

pytest.importorskip("triton")
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

IMPLEMENTATIONS = ["reference", "triton"]
SURROGATES = ["rectangle", "moreau"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 130), (3, 257), (130, 70), (2, 4100)]
FIELDS = ("z", "l0", "sub", "d_pre", "d_threshold")


class Case(NamedTuple):
    """Inputs of one call and the gradients that come back to it."""

    pre: Tensor
    threshold: Tensor
    bandwidth: Tensor
    surrogate: str
    dz: Tensor
    dl0: Tensor
    dsub: Tensor


def make_case(
    shape: tuple[int, int], dtype: torch.dtype, surrogate: str, regime: str = "mixed"
) -> Case:
    """Values on a grid of 1/64, exact in bfloat16, so that ties and window edges do occur."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows * 10_000 + columns)

    def grid(*size: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator) / 64

    threshold = grid(columns, low=1, high=128)
    pre = grid(rows, columns, low=-256, high=256)
    if regime == "ties":
        pre = torch.where(torch.rand(shape, generator=generator) < 0.7, threshold, pre)
    if regime == "all dead":
        threshold = threshold + 50
    if regime == "all active":
        threshold = threshold - 50
    return Case(
        pre=pre.to(dtype),
        threshold=threshold,
        bandwidth=2 * grid(columns, low=0, high=64),
        surrogate=surrogate,
        dz=torch.randn(shape, generator=generator).to(dtype),
        dl0=torch.randn(rows, generator=generator),
        dsub=torch.randn(rows, generator=generator),
    )


def formulas(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients written straight from M4 and M6, computed in ``dtype``."""
    pre, theta, epsilon, dz, dl0, dsub = (
        tensor.to(dtype) for tensor in (*case[:3], case.dz, case.dl0[:, None], case.dsub[:, None])
    )
    gate = (pre > theta).to(dtype)
    positive = torch.maximum(pre, torch.zeros_like(pre))
    u = pre - theta
    if case.surrogate == "rectangle":
        weight = torch.where(u.abs() < epsilon / 2, 1 / epsilon, 0)
    else:
        gamma = epsilon**2 / 2
        weight = torch.where((u > 0) & (u < epsilon), u / gamma, 0)
    return {
        "z": pre * gate,
        "l0": gate.sum(1),
        "sub": (positive**2 * (1 - gate)).sum(1),
        "d_pre": dz * gate + dsub * 2 * positive * (1 - gate),
        "d_threshold": -((dz * theta + dl0 - dsub * theta**2) * weight).sum(0),
    }


def call(case: Case, implementation: str) -> dict[str, Tensor]:
    device = KERNEL_DEVICE if implementation == "triton" else "cpu"
    pre, threshold, bandwidth, dz, dl0, dsub = (
        tensor.to(device) for tensor in (*case[:3], *case[4:])
    )
    pre.requires_grad_()
    threshold.requires_grad_()
    outputs = jumprelu(pre, threshold, bandwidth, case.surrogate, implementation=implementation)
    gradients = torch.autograd.grad(outputs, [pre, threshold], [dz, dl0, dsub])
    found = [tensor.detach().cpu() for tensor in (*outputs, *gradients)]
    return dict(zip(FIELDS, found, strict=True))


def assert_as_good_as_native(found: dict[str, Tensor], case: Case) -> None:
    """No output or gradient errs more than twice as much as PyTorch's own arithmetic does.

    Native means: for z and d_pre the exact value rounded once to the type of ``pre``, for the sums
    the same formula in float32. Errors are maxima over a tensor, against float64; one unit in the
    last place of the largest value is always allowed, since a native error can be 0 by luck.
    """
    exact = formulas(case, torch.float64)
    native = formulas(case, torch.float32)
    for name in FIELDS:
        kept = case.pre.dtype if name in ("z", "d_pre") else torch.float32
        rounded = (exact if name in ("z", "d_pre") else native)[name].to(kept).double()
        ulp = torch.finfo(kept).eps * exact[name].abs().max()
        allowed = 2 * (rounded - exact[name]).abs().max() + ulp
        error = (found[name].double() - exact[name]).abs().max()
        assert found[name].dtype == kept
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_float64(
    shape: tuple[int, int], dtype: torch.dtype, surrogate: str, implementation: str
) -> None:
    case = make_case(shape, dtype, surrogate)
    assert_as_good_as_native(call(case, implementation), case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["ties", "all dead", "all active"])
def test_edge_regimes_match_float64(
    regime: str, dtype: torch.dtype, surrogate: str, implementation: str
) -> None:
    case = make_case((9, 67), dtype, surrogate, regime)
    found = call(case, implementation)
    assert_as_good_as_native(found, case)
    if regime == "all dead":
        assert not found["l0"].any() and not found["z"].any()
    if regime == "all active":
        assert (found["l0"] == 67).all() and not found["sub"].any()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_i3_kernel_agrees_with_reference(dtype: torch.dtype, surrogate: str) -> None:
    case = make_case((37, 300), dtype, surrogate, "ties")
    kernel, reference = call(case, "triton"), call(case, "reference")
    assert torch.equal(kernel["z"], reference["z"])
    assert torch.equal(kernel["l0"], reference["l0"])
    # Rounding of d_pre to bfloat16 may differ by a unit in the last place, no more.
    torch.testing.assert_close(
        kernel["d_pre"], reference["d_pre"], rtol=torch.finfo(dtype).eps, atol=0
    )
    exact = formulas(case, torch.float64)
    for name in ("sub", "d_threshold"):
        error = (reference[name] - exact[name]).abs().max()
        ulp = torch.finfo(torch.float32).eps * exact[name].abs().max()
        assert (kernel[name] - exact[name]).abs().max() <= 2 * error + ulp


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("used", [c for n in (1, 2) for c in combinations(range(3), n)], ids=str)
def test_an_output_left_out_of_the_loss_counts_as_a_zero_gradient(
    used: tuple[int, ...], implementation: str
) -> None:
    case = make_case((6, 40), torch.float32, "rectangle")
    gradients = [case.dz, case.dl0, case.dsub]
    zeroed = [g if i in used else torch.zeros_like(g) for i, g in enumerate(gradients)]
    device = KERNEL_DEVICE if implementation == "triton" else "cpu"
    inputs = [t.to(device).requires_grad_() for t in case[:2]]
    outputs = jumprelu(*inputs, case.bandwidth.to(device), implementation=implementation)
    d_pre, d_threshold = torch.autograd.grad(
        [outputs[i] for i in used],
        inputs,
        [gradients[i].to(device) for i in used],
        allow_unused=True,
    )
    expected = formulas(case._replace(dz=zeroed[0], dl0=zeroed[1], dsub=zeroed[2]), torch.float64)
    if used == (1,):
        assert d_pre is None, "the L0 gradient must not reach pre (M6)"
    else:
        torch.testing.assert_close(d_pre.cpu(), expected["d_pre"].float())
    torch.testing.assert_close(d_threshold.cpu(), expected["d_threshold"].float())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_is_wanted_gets_a_gradient(implementation: str) -> None:
    case = make_case((4, 20), torch.float32, "moreau")
    device = KERNEL_DEVICE if implementation == "triton" else "cpu"
    for index, name in ((0, "d_pre"), (1, "d_threshold")):
        inputs = [t.to(device) for t in case[:2]]
        bandwidth = case.bandwidth.to(device).requires_grad_()
        inputs[index].requires_grad_()
        outputs = jumprelu(*inputs, bandwidth, "moreau", implementation=implementation)
        back = [g.to(device) for g in case[4:]]
        found, none = torch.autograd.grad(
            outputs, [inputs[index], bandwidth], back, allow_unused=True
        )
        assert none is None
        torch.testing.assert_close(found.cpu(), formulas(case, torch.float64)[name].float())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_are_inactive(implementation: str) -> None:
    device = KERNEL_DEVICE if implementation == "triton" else "cpu"
    threshold = torch.tensor([0.1, 1 / 3, 2.0], device=device)
    above = torch.nextafter(threshold, threshold + 1)
    pre = torch.stack([threshold, above])
    z, l0, sub = jumprelu(pre, threshold, threshold, implementation=implementation)
    assert not z[0].any() and torch.equal(z[1], above)
    assert l0.tolist() == [0, 3]
    torch.testing.assert_close(sub[0], threshold.square().sum())
    assert sub[1] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_is_passed_on(implementation: str) -> None:
    device = KERNEL_DEVICE if implementation == "triton" else "cpu"
    pre = torch.tensor([[0.0, float("nan")], [1.0, 2.0]], device=device)
    ones = torch.ones(2, device=device)
    z, _, sub = jumprelu(pre, ones, ones, implementation=implementation)
    assert z.isnan().tolist() == [[False, True], [False, False]]
    assert sub.isnan().tolist() == [True, False]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_input(shape: tuple[int, int], implementation: str) -> None:
    device = KERNEL_DEVICE if implementation == "triton" else "cpu"
    pre = torch.ones(shape, device=device, requires_grad=True)
    threshold = torch.ones(shape[1], device=device, requires_grad=True)
    z, l0, sub = jumprelu(pre, threshold, threshold.detach(), implementation=implementation)
    (z.sum() + l0.sum() + sub.sum()).backward()
    assert z.shape == shape and l0.tolist() == sub.tolist() == [0.0] * shape[0]
    assert threshold.grad is not None and threshold.grad.tolist() == [0.0] * shape[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_inputs_and_gradients(implementation: str) -> None:
    case = make_case((12, 33), torch.float32, "rectangle")
    strided = case._replace(
        pre=case.pre.T.contiguous().T, dz=case.dz.T.contiguous().T, dl0=case.dl0[:1].expand(12)
    )
    assert_as_good_as_native(call(strided, implementation), strided)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_identical(implementation: str) -> None:
    case = make_case((130, 70), torch.float32, "rectangle")
    first, second = call(case, implementation), call(case, implementation)
    assert all(torch.equal(first[name], second[name]) for name in FIELDS)


def uniform_around(threshold: Tensor, bandwidth: Tensor, count: int) -> Tensor:
    """[count, d_sae]: midpoints of a uniform density 1/(2ε) on (θ − ε, θ + ε)."""
    fractions = (torch.arange(count) + 0.5) / count * 2 - 1
    return threshold + bandwidth * fractions[:, None]


def mean_loss(pre: Tensor, threshold: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """a·z + b·gate + c·sub of each feature alone, mean over tokens: [d_sae], float64."""
    columns = []
    for j in range(len(threshold)):
        theta = threshold[j : j + 1]
        z, l0, sub = jumprelu(pre[:, j : j + 1], theta, torch.ones(1), implementation="reference")
        a, b, c = weights
        columns.append((a * z[:, 0].double() + b * l0.double() + c * sub.double()).mean())
    return torch.stack(columns)


WEIGHTS = (0.7, -1.3, 0.4)
THRESHOLD = torch.tensor([0.6, 1.1, 2.5])
BANDWIDTH = torch.tensor([0.4, 0.9, 0.5])
TOKENS = 16_384


def reference_threshold_gradient(pre: Tensor, surrogate: str) -> Tensor:
    """Gradient of the mean loss of `mean_loss`, as the surrogate gives it."""
    threshold = THRESHOLD.clone().requires_grad_()
    z, l0, sub = jumprelu(pre, threshold, BANDWIDTH, surrogate, implementation="reference")
    a, b, c = WEIGHTS
    # l0 and sub sum over features, and every feature has its own threshold.
    (a * z.sum() + b * l0.sum() + c * sub.sum()).div(len(pre)).backward()
    assert threshold.grad is not None
    return threshold.grad.double()


def test_i3_rectangle_matches_the_difference_of_the_jittered_loss() -> None:
    """E over ξ ~ U(−ε/2, ε/2) of the loss with θ + ξ, differenced centrally with step h.

    With density p = 1/(2ε) the difference is −p·E[f(τ)], f(τ) = aτ + b − cτ², τ = θ + ξ + U(−h, h).
    The surrogate evaluates f at θ, so it lacks the variance of τ, ε²/12 + h²/3, in the quadratic
    term. Adding that makes the comparison exact up to the two grids.
    """
    pre = uniform_around(THRESHOLD, BANDWIDTH, TOKENS)
    step = BANDWIDTH / 8
    jitter = (torch.arange(64) + 0.5) / 64 - 0.5
    difference = torch.stack(
        [
            mean_loss(pre, THRESHOLD + xi * BANDWIDTH + step, WEIGHTS)
            - mean_loss(pre, THRESHOLD + xi * BANDWIDTH - step, WEIGHTS)
            for xi in jitter.tolist()
        ]
    ).mean(0) / (2 * step)
    variance = BANDWIDTH**2 / 12 + step**2 / 3
    expected = difference - WEIGHTS[2] * variance / (2 * BANDWIDTH)
    found = reference_threshold_gradient(pre, "rectangle")
    torch.testing.assert_close(found, expected.double(), rtol=2e-3, atol=0)


def test_i3_moreau_matches_the_difference_of_the_envelope() -> None:
    """d/dθ of f(θ₀)·min(1, relu(pre − θ)²/2γ) at θ₀, on a sample of no particular density."""
    pre = torch.randn(TOKENS, 3, generator=torch.Generator().manual_seed(0)) + THRESHOLD
    theta, gamma, step = THRESHOLD.double(), BANDWIDTH.double() ** 2 / 2, 1e-5
    a, b, c = WEIGHTS
    jump = a * theta + b - c * theta**2

    def envelope(at: Tensor) -> Tensor:
        rise = (pre.double() - at).clamp(min=0) ** 2 / (2 * gamma)
        return jump * rise.clamp(max=1).mean(0)

    expected = (envelope(theta + step) - envelope(theta - step)) / (2 * step)
    found = reference_threshold_gradient(pre, "moreau")
    # The envelope has a kink at u = ε; samples within `step` of it are what the difference misses.
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_i3_surrogate_is_the_derivative_of_the_expected_loss(surrogate: str) -> None:
    """On a uniform density both surrogates equal −p·f(θ), the true derivative of the mean loss."""
    pre = uniform_around(THRESHOLD, BANDWIDTH, TOKENS)
    step = BANDWIDTH / 8
    difference = mean_loss(pre, THRESHOLD + step, WEIGHTS) - mean_loss(
        pre, THRESHOLD - step, WEIGHTS
    )
    expected = difference / (2 * step) - WEIGHTS[2] * step**2 / 3 / (2 * BANDWIDTH)
    found = reference_threshold_gradient(pre, surrogate)
    torch.testing.assert_close(found, expected.double(), rtol=2e-3, atol=0)


def test_zero_bandwidth_gives_a_zero_threshold_gradient() -> None:
    threshold = torch.ones(3, requires_grad=True)
    z, _, _ = jumprelu(torch.ones(4, 3), threshold, torch.zeros(3))
    z.sum().backward()
    assert threshold.grad is not None and threshold.grad.tolist() == [0.0, 0.0, 0.0]


def test_auto_takes_the_reference_on_a_cpu_and_says_why() -> None:
    choice = choose(torch.empty(1))
    assert choice.implementation == "reference"
    assert "cpu" in choice.reason


def test_triton_on_a_cpu_without_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        choose(torch.empty(1), "triton")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("surrogate", {"surrogate": "gaussian"}),
        ("implementation", {"implementation": "cuda"}),
        ("pre", {"pre": torch.zeros(2, 3, 4)}),
        ("pre", {"pre": torch.zeros(2, 4, dtype=torch.float64)}),
        ("threshold", {"threshold": torch.zeros(3)}),
        ("threshold", {"threshold": torch.zeros(4, dtype=torch.bfloat16)}),
        ("bandwidth", {"bandwidth": torch.zeros(1)}),
        ("bandwidth", {"bandwidth": torch.zeros(4, device="meta")}),
    ],
    ids=str,
)
def test_bad_input_names_the_argument(key: str, changes: dict[str, object]) -> None:
    good = {"pre": torch.zeros(2, 4), "threshold": torch.zeros(4), "bandwidth": torch.ones(4)}
    with pytest.raises(UserError) as caught:
        jumprelu(**{**good, **changes})  # type: ignore[arg-type]
    assert caught.value.key == key


def test_importing_the_package_does_not_import_triton() -> None:
    script = "import sys, spalf.kernels; sys.exit('triton' in sys.modules)"
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
