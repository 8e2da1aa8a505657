"""The SAE on lists of active entries, and the fused Adam, against formulas in float64 (M4, M6, M7).

On a GPU the kernels run there; elsewhere in Triton's interpreter, at sizes it can manage.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spalf.kernels import (
    Parameters,
    Plan,
    PreActivations,
    autoencode,
    choose_lists,
    list_capacity,
)
from tests.helpers_kernels import poisoned_buffers  # noqa: F401 - used by every test

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LISTS = ["triton"] if ON_GPU else ["triton", "torch"]

pytestmark = pytest.mark.gpu if ON_GPU else []
NAMES = ("x", "W_enc", "b_enc", "threshold", "W_dec", "b_dec")
SIZES = [(9, 70, 24), (1, 130, 8), (5, 64, 33), (270, 3, 8)]
if ON_GPU:
    SIZES += [(4096, 8192, 256), (600, 20_001, 64), (1000, 4099, 130), (1, 65_537, 64)]


class Case:
    """Inputs on a coarse grid, so that products are exact and ties at the threshold do occur."""

    def __init__(self, size: tuple[int, int, int], regime: str = "mixed", seed: int = 0) -> None:
        tokens, d_sae, width = size
        generator = torch.Generator().manual_seed(seed)

        def grid(*shape: int, low: int, high: int, step: float) -> Tensor:
            drawn = torch.randint(low, high, shape, generator=generator) * step
            return drawn.to(DEVICE)

        self.tensors = {
            "x": grid(tokens, width, low=-4, high=5, step=0.25),
            "W_enc": grid(d_sae, width, low=-2, high=3, step=0.25),
            "b_enc": grid(d_sae, low=-2, high=3, step=0.25),
            "threshold": grid(d_sae, low=1, high=13, step=0.25),
            "W_dec": grid(d_sae, width, low=-2, high=3, step=0.25),
            "b_dec": grid(width, low=-2, high=3, step=0.25),
        }
        self.bandwidth = grid(d_sae, low=0, high=9, step=0.5)
        shift = {"all dead": 1000.0, "all active": -1000.0}.get(regime, 0.0)
        self.tensors["b_enc"] -= shift
        self.sub_rows = min(tokens, 16)
        self.back = (
            torch.randn(tokens, width, generator=generator).to(DEVICE),
            torch.randn(tokens, generator=generator).to(DEVICE),
            torch.randn(self.sub_rows, generator=generator).to(DEVICE),
        )

    def run(
        self,
        capacity: int | None,
        surrogate: str = "rectangle",
        precision: str = "float32",
        lists: str = "triton",
        *,
        centred: bool = False,
    ) -> tuple[list[Tensor], dict[str, Tensor], object]:
        """Outputs, gradients and all else of a pass on lists; dense where capacity is ``None``."""
        leaves = {n: t.clone().requires_grad_() for n, t in self.tensors.items()}
        parameters = Parameters(*(leaves[n] for n in NAMES[1:]), self.bandwidth)
        kernel = "reference" if capacity is None else "triton"
        room = (None, 0) if capacity is None else (lists, capacity)
        plan = Plan(surrogate, precision, kernel, self.sub_rows, *room, centred)  # type: ignore[arg-type]
        out = autoencode(leaves["x"], parameters, plan)
        outputs = [out.x_hat, out.l0, out.subthreshold]
        torch.autograd.backward(outputs, self.back)
        return outputs, {n: t.grad for n, t in leaves.items() if t.grad is not None}, out

    def exact(self, surrogate: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs and gradients by the formulas, in float64."""
        t = {n: v.double() for n, v in self.tensors.items()}
        theta, eps = t["threshold"], self.bandwidth.double()
        pre = t["x"] @ t["W_enc"].T + t["b_enc"]
        gate = (pre > theta).double()
        z, below = pre * gate, pre.relu() * (1 - gate)
        below[self.sub_rows :] = 0
        outputs = [z @ t["W_dec"] + t["b_dec"], gate.sum(1), below.square().sum(1)[: self.sub_rows]]
        dx, dl0, dsub = (g.double() for g in self.back)
        dsub = torch.cat([dsub, dsub.new_zeros(len(pre) - self.sub_rows)])
        dz = dx @ t["W_dec"].T
        d_pre = dz * gate + 2 * dsub[:, None] * below
        u = pre - theta
        if surrogate == "rectangle":
            window = (u.abs() < eps / 2) / eps
        else:
            window = u * ((u > 0) & (u < eps)) * 2 / eps.square()
        window = window.nan_to_num(0.0)
        d_gate = dz * theta + dl0[:, None] - dsub[:, None] * theta.square()
        gradients = {
            "x": d_pre @ t["W_enc"],
            "W_enc": d_pre.T @ t["x"],
            "b_enc": d_pre.sum(0),
            "threshold": -(d_gate * window).sum(0),
            "W_dec": z.T @ dx,
            "b_dec": dx.sum(0),
        }
        return outputs, gradients


def error(found: Tensor, exact: Tensor) -> float:
    """Largest error, as a share of the largest exact value."""
    if exact.numel() == 0:
        return 0.0
    return float((found.detach().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize("surrogate", ["rectangle", "moreau"])
@pytest.mark.parametrize("regime", ["mixed", "all dead", "all active"])
@pytest.mark.parametrize("size", SIZES)
def test_lists_give_what_the_formulas_give(
    size: tuple[int, int, int], regime: str, surrogate: str, lists: str
) -> None:
    if regime == "all active" and size[0] * size[1] > 2**20:
        pytest.skip("lists of everything at this size are what the dense path is for")
    case = Case(size, regime)
    outputs, gradients, _ = case.run(size[0] * size[1], surrogate, lists=lists)
    dense_outputs, dense_gradients, _ = case.run(None, surrogate)
    exact_outputs, exact_gradients = case.exact(surrogate)
    for found, dense, exact in zip(outputs, dense_outputs, exact_outputs, strict=True):
        assert error(found, exact) <= 2 * error(dense, exact) + 2e-6
    assert set(gradients) == set(NAMES)
    for name in NAMES:
        native = error(dense_gradients[name], exact_gradients[name])
        assert error(gradients[name], exact_gradients[name]) <= 2 * native + 2e-6, name


@pytest.mark.parametrize("lists", [*LISTS, None])
@pytest.mark.parametrize("regime", ["mixed", "all dead", "all active"])
@pytest.mark.parametrize("size", SIZES)
def test_a_centred_gradient_is_that_for_codes_less_their_mean(
    size: tuple[int, int, int], regime: str, lists: str | None
) -> None:
    if regime == "all active" and size[0] * size[1] > 2**20:
        pytest.skip("lists of everything at this size are what the dense path is for")
    case = Case(size, regime)
    capacity = None if lists is None else size[0] * size[1]
    outputs, gradients, _ = case.run(capacity, lists=lists or "", centred=True)
    plain_outputs, plain, _ = case.run(capacity, lists=lists or "")
    for found, expected in zip(outputs, plain_outputs, strict=True):
        assert torch.equal(found, expected)
    for name in set(NAMES) - {"W_dec"}:
        assert torch.equal(gradients[name], plain[name]), name
    t = {n: v.double() for n, v in case.tensors.items()}
    pre = t["x"] @ t["W_enc"].T + t["b_enc"]
    z = pre * (pre > t["threshold"])
    dx = case.back[0].double()
    expected = (z - z.mean(dim=0)).T @ dx
    # Of one token nothing is left but rounding, so errors are shares of what was subtracted from.
    scale = (z.abs().T @ dx.abs()).amax().clamp_min(1.0)
    assert (gradients["W_dec"].double() - expected).abs().max() <= 1e-6 * scale


def test_lists_of_a_dictionary_that_is_looked_at_in_several_goes() -> None:
    """More features than a program writes at a time, for more than one token."""
    from spalf.kernels.triton_lists import FILL_WORDS, scan

    case = Case((3, 32 * FILL_WORDS + 70, 3))
    t, half = case.tensors, case.bandwidth / 2
    raw = t["x"] @ t["W_enc"].T
    lists = scan(raw, t["b_enc"], t["threshold"], t["threshold"] - half, 3, raw.numel()).lists
    pre = raw + t["b_enc"]
    gate, listed = pre > t["threshold"], pre > t["threshold"] - half
    expected = [
        (token, feature)
        for token in range(3)
        for part in (gate, listed & ~gate)
        for feature in part[token].nonzero().flatten().tolist()
    ]
    count = len(expected)
    found = list(zip(lists.token[:count].tolist(), lists.feature[:count].tolist(), strict=True))
    assert found == expected
    assert lists.token_start.tolist() == [0, *listed.sum(dim=1).cumsum(0).tolist()]
    assert (lists.active_end - lists.token_start[:-1]).tolist() == gate.sum(dim=1).tolist()
    values = pre[lists.token[:count].long(), lists.feature[:count].long()]
    assert torch.equal(lists.value[:count], values)


@pytest.mark.parametrize("lists", LISTS)
def test_grid_has_ties_and_a_tie_is_inactive(lists: str) -> None:
    case = Case((9, 70, 24))
    pre = case.tensors["x"] @ case.tensors["W_enc"].T + case.tensors["b_enc"]
    ties = pre == case.tensors["threshold"]
    assert ties.any()
    outputs, _, _ = case.run(2**11, lists=lists)
    assert torch.equal(outputs[1], (pre > case.tensors["threshold"]).float().sum(1))


@pytest.mark.parametrize("lists", LISTS)
def test_a_second_pass_repeats_the_first_bit_for_bit(lists: str) -> None:
    case = Case(SIZES[-1] if ON_GPU else (9, 70, 24))
    first, second = (case.run(2**20 if ON_GPU else 2**10, lists=lists) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][n], second[1][n]) for n in NAMES)


def test_capacity_changes_nothing_unless_it_is_too_small() -> None:
    case = Case((9, 70, 24))
    roomy, ample, short = (case.run(capacity) for capacity in (2**10, 2**11, 64))
    assert not roomy[2].overflow and not ample[2].overflow  # type: ignore[attr-defined]
    assert short[2].overflow  # type: ignore[attr-defined]
    for name in NAMES:
        assert torch.equal(roomy[1][name], ample[1][name]), name


def test_features_with_many_entries_are_summed_in_parts() -> None:
    """600 tokens on a feature that is always active: three segments."""
    case = Case((600, 3, 8), "all active")
    _, gradients, _ = case.run(2**11)
    _, exact = case.exact("rectangle")
    assert error(gradients["W_dec"], exact["W_dec"]) < 2e-6
    assert error(gradients["W_enc"], exact["W_enc"]) < 2e-6


def test_bfloat16_operands_cost_bfloat16_rounding_only() -> None:
    case = Case((9, 70, 24))
    outputs, gradients, _ = case.run(2**11, precision="bfloat16")
    _, dense, _ = case.run(None, precision="bfloat16")
    exact_outputs, exact = case.exact("rectangle")
    assert error(outputs[0], exact_outputs[0]) < 2e-2
    for name in NAMES:
        assert error(gradients[name], exact[name]) <= 2 * error(dense[name], exact[name]) + 1e-2


@pytest.mark.parametrize("lists", LISTS)
def test_a_nan_is_not_gated_away(lists: str) -> None:
    case = Case((5, 64, 33))
    case.tensors["x"][2, 0] = float("nan")
    outputs, _, _ = case.run(2**12, lists=lists)
    assert outputs[0][2].isnan().all()
    assert not outputs[0][[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("lists", LISTS)
def test_outputs_that_nobody_uses_cost_nothing_going_back(lists: str) -> None:
    case = Case((5, 64, 33))
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items()}
    parameters = Parameters(*(leaves[n] for n in NAMES[1:]), case.bandwidth)
    plan = Plan("rectangle", "float32", "triton", 5, lists, 2**12)  # type: ignore[arg-type]
    autoencode(leaves["x"], parameters, plan).l0.sum().backward()
    pre = case.tensors["x"] @ case.tensors["W_enc"].T + case.tensors["b_enc"]
    near = ((pre - case.tensors["threshold"]).abs() < case.bandwidth / 2).float().sum(0)
    expected = torch.where(case.bandwidth > 0, -near / case.bandwidth, 0.0)
    torch.testing.assert_close(leaves["threshold"].grad, expected)
    assert leaves["W_enc"].grad is None or not leaves["W_enc"].grad.any()


@pytest.mark.parametrize("sphere_from", [None, 3])
def test_fused_adam_is_adam_between_projection_and_normalisation(sphere_from: int | None) -> None:
    from spalf.kernels.triton_adam import AdamScalars, adam, square_norms

    generator = torch.Generator().manual_seed(0)
    start = nn.functional.normalize(torch.randn(11, 37, generator=generator), dim=1).to(DEVICE)
    plain = nn.Parameter(start.double())
    optimizer = torch.optim.Adam([plain], lr=3e-3, betas=(0.9, 0.999))
    weight, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    rows = slice(11 if sphere_from is None else sphere_from, None)
    for step in range(1, 6):
        grad = torch.randn(11, 37, generator=generator).to(DEVICE)
        wide = grad.double()
        free = plain.detach()[rows]
        wide[rows] -= (wide[rows] * free).sum(1, keepdim=True) * free
        norms = square_norms(grad, weight, sphere_from)
        torch.testing.assert_close(norms, wide.square().sum(1).float(), rtol=1e-5, atol=1e-5)
        plain.grad = 0.5 * wide
        optimizer.step()
        with torch.no_grad():
            plain[rows] = nn.functional.normalize(plain[rows], dim=1)
        numbers = (3e-3 / (1 - 0.9**step), (1 - 0.999**step) ** -0.5, 0.5, 0.0)
        scalars = AdamScalars(*(torch.tensor(v, device=DEVICE) for v in numbers))
        low = torch.empty_like(weight, dtype=torch.bfloat16)
        adam(grad, weight, (mean, square), scalars, (0.9, 0.999), 1e-8, sphere_from, low)
        torch.testing.assert_close(low.float(), weight, rtol=2**-7, atol=0)
        torch.testing.assert_close(weight.double(), plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows, width", [(7, 20), (40, 64), (3, 1)])
def test_rows_are_added_where_places_repeat(rows: int, width: int) -> None:
    from spalf.kernels.triton_rows import add_rows, sort_places

    generator = torch.Generator().manual_seed(rows)
    index = torch.randint(rows - 1, (6, 5), generator=generator)  # nothing for the last row
    added = torch.randn(6, 5, width, generator=generator)
    total = torch.randn(rows, width, generator=generator)
    expected = total.double().index_put((index,), added.double(), accumulate=True).float()
    summed = total.to(DEVICE, copy=True)
    add_rows(summed, added.to(DEVICE), sort_places(index.to(DEVICE), rows))
    torch.testing.assert_close(summed.cpu(), expected)
    assert torch.equal(summed[-1].cpu(), total[-1])


def test_fused_adam_steps_vectors_and_leaves_everything_where_it_is_frozen() -> None:
    from spalf.kernels.triton_adam import AdamScalars, adam

    weight = torch.arange(2500.0, device=DEVICE)
    grad = torch.ones_like(weight)
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    one = torch.ones((), device=DEVICE)
    adam(grad, weight, moments, AdamScalars(one, one, one, one), (0.9, 0.999), 1e-8)
    assert torch.equal(weight, torch.arange(2500.0, device=DEVICE))
    assert not moments[0].any() and not moments[1].any()
    adam(grad, weight, moments, AdamScalars(one, one, one, 0 * one), (0.9, 0.999), 1e-8)
    expected = torch.arange(2500.0, device=DEVICE) - 0.1 / 0.001**0.5
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-3)


def test_the_choice_between_lists_and_dense_products_is_explained() -> None:
    x = torch.zeros(1, 1)
    assert choose_lists(x, 1000, 5.0, "auto") == ("torch", "0.50% of the entries are active")
    assert choose_lists(x, 1000, 500.0, "auto").implementation == "reference"
    assert choose_lists(x, 1000, 5.0, "reference") == ("reference", "asked for")


def test_dense_products_are_chosen_where_much_is_active() -> None:
    x = torch.zeros(1, 1, device=DEVICE)
    assert choose_lists(x, 1000, 5.0, "triton").implementation == "triton"
    dense = choose_lists(x, 1000, 500.0, "triton")
    assert dense.implementation == "reference"
    assert "50.0% of the entries are active" in dense.reason


def test_room_for_the_lists_is_a_power_of_two_and_at_most_everything() -> None:
    assert list_capacity(4096, 32_768, 64.0) == 2**20
    assert list_capacity(4096, 32_768, 64.0, margin=2.0) == 2**21
    assert list_capacity(4, 100, 50.0) == 400


@pytest.mark.parametrize("d_sae", [2**15, 2**15 + 1])
def test_features_keep_their_order_where_keys_use_all_of_their_bits(d_sae: int) -> None:
    """The key of the last feature's entries is the one that room not in use has, or near it."""
    from spalf.kernels.triton_lists import scan

    last = d_sae - 1
    raw = torch.zeros(3, d_sae, device=DEVICE)
    for token, feature, value in ((0, last, 2.0), (2, last, 3.0), (1, 0, 1.0), (0, 5, 0.45)):
        raw[token, feature] = value
    bias = torch.zeros(d_sae, device=DEVICE)
    found = scan(raw, bias, bias + 0.5, bias + 0.4, sub_rows=2, capacity=16)
    found.aside.join()
    found.lists.sorting.join()
    order = found.lists.order[:4]
    assert int(found.lists.total) == 4 and not found.lists.overflow
    assert found.lists.feature[order].tolist() == [0, 5, last, last]
    assert found.lists.token[order].tolist() == [1, 0, 0, 2]
    start = found.lists.feature_start.tolist()
    assert [start[2 * feature] for feature in (0, 5, last, d_sae)] == [0, 1, 2, 4]
    assert [start[2 * feature + 1] for feature in (0, 5, last)] == [1, 1, 4]
    assert found.fired.nonzero().flatten().tolist() == [0, last]
    assert found.l0.tolist() == [1.0, 1.0, 1.0]
    assert found.subthreshold.tolist() == pytest.approx([0.45**2, 0.0])


@pytest.mark.parametrize("n", [1, 3, 8, 20, 70])
def test_the_strongest_features_of_lists_are_those_of_the_codes(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a token has more of them than are wanted, fewer, or none."""
    from spalf.kernels.triton_lists import scan

    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(9, 70, generator=generator).to(DEVICE)
    raw[3], raw[4] = -1.0, raw[4].abs() + 1.0
    bias = 0.1 * torch.randn(70, generator=generator).to(DEVICE)
    threshold = 0.2 + torch.rand(70, generator=generator).to(DEVICE)
    lists = scan(raw, bias, threshold, threshold - 0.3, 0, capacity=1024).lists
    of_lists = PreActivations(raw, bias, threshold, lists).strongest(6, n)
    of_codes = PreActivations(raw, bias, threshold).strongest(6, n)
    assert of_lists[0].dtype == of_codes[0].dtype == torch.int64
    assert torch.equal(of_lists[1], of_codes[1])
    assert of_lists[1].sum(dim=1)[3:5].tolist() == [0, n]
    active = of_lists[1] > 0
    assert torch.equal(of_lists[0][active], of_codes[0][active])
    assert of_lists[0].ge(0).all() and of_lists[0].lt(70).all()
    # By its globals, as the package has a function of its module's name.
    monkeypatch.setitem(PreActivations.strongest.__globals__, "MOST_SORTED", n - 1)
    searched = PreActivations(raw, bias, threshold, lists).strongest(6, n)
    assert all(torch.equal(a, b) for a, b in zip(searched, of_codes, strict=True))
