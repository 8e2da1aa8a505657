"""Phase 1 replayed from a CUDA graph: interrupted runs end where uninterrupted ones do."""

from __future__ import annotations

import pytest
import torch

from spalf.bench.problem import Pool, Shape, config_for, run_on, train
from spalf.config import schedule
from spalf.training.graph import GraphedStep, stepper
from spalf.training.step import train_step

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


def test_branches_of_the_graph_change_nothing() -> None:
    """Side by side in a graph or one after another, the same kernels give the same bits."""
    ends = []
    for graphed in (True, False):
        config, pool = config_for(SHAPE), Pool(SHAPE, torch.device("cuda"))
        state, phase = run_on(config, pool)
        plan = schedule(config)
        step = stepper(state, phase, config)
        batches = pool.batches(SHAPE.batch, 0, 0)
        for _ in range(60):
            batch = next(batches)
            step(batch) if graphed else train_step(state, batch, phase, config, plan)
        sae, control = state.sae, state.controller
        tensors = [*sae.parameters(), sae.bandwidth, state.stale, control.log_tau, *control.law]
        ends.append([tensor.detach().clone() for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
