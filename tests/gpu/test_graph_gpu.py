"""Phase 1 replayed from a CUDA graph: interrupted runs end where uninterrupted ones do."""

from __future__ import annotations

import pytest
import torch

from spalf.bench.problem import Pool, Shape, config_for, run_on, train
from spalf.training.graph import GraphedStep, stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = Shape(d_model=256, F=8192, L0=32, batch=4096)


def weights_after(*legs: int) -> list[torch.Tensor]:
    """Weights and setpoint after legs of so many steps, each with a recording of its own."""
    config, pool = config_for(SHAPE), Pool(SHAPE, torch.device("cuda"))
    state, phase = run_on(config, pool)
    assert isinstance(stepper(state, phase, config), GraphedStep)
    for steps in legs:
        train(state, phase, config, steps)
    sae = state.sae
    tensors = [sae.W_dec, sae.W_enc, sae.b_enc, sae.log_threshold, state.controller.log_tau]
    return [tensor.detach().clone() for tensor in tensors]


def test_a_run_in_two_legs_equals_one_in_one_bit_for_bit() -> None:
    one, two = weights_after(120), weights_after(67, 53)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_branches_of_the_graph_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side in a graph or one after another, the same kernels give the same bits."""
    branching = weights_after(60)
    monkeypatch.setattr("spalf.training.graph.WARM_UP_STEPS", 1000)  # nothing is recorded
    one_by_one = weights_after(60)
    assert all(torch.equal(a, b) for a, b in zip(branching, one_by_one, strict=True))
