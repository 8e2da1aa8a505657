"""The finite guard on a GPU: it freezes the fused optimiser exactly, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from spalf.training.guard import FiniteGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _run(bad: set[int], guarded: bool, steps: int = 12) -> tuple[torch.Tensor, dict[str, object]]:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 32, device="cuda", generator=generator))
    optimizer = torch.optim.Adam([weight], lr=1e-2, fused=True)
    guard = FiniteGuard(weight.device)
    for step in range(steps):
        gradient = torch.randn(64, 32, device="cuda", generator=generator)
        weight.grad = gradient * float("nan") if step in bad else gradient
        norm = torch.linalg.vector_norm(weight.grad)
        if guarded:
            guard.observe(weight.detach().sum(), norm)
            guard.update(optimizer)
        else:
            optimizer.step()
    state = optimizer.state[weight]
    return weight.detach().clone(), {**state, "stalled": guard.stalled()}


def test_nothing_changes_while_all_is_finite() -> None:
    plain, plain_state = _run(set(), guarded=False)
    guarded, state = _run(set(), guarded=True)
    assert torch.equal(plain, guarded)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(plain_state[name], state[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_scalar_is_poisoned_for_good(bad: float) -> None:
    guard = FiniteGuard(torch.device("cuda"))
    fine = torch.ones((), device="cuda")
    guard.observe(fine, fine)
    assert guard.stalled() == 0
    guard.observe(fine * bad, fine)
    guard.observe(fine, fine)
    assert guard.stalled() == 2


def test_from_the_first_bad_step_on_weights_and_moments_stand_still() -> None:
    before, before_state = _run(set(), guarded=True, steps=5)
    after, state = _run({5, 8}, guarded=True)
    assert state["stalled"] == 7
    assert torch.equal(before, after)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(before_state[name], state[name])  # type: ignore[arg-type]
