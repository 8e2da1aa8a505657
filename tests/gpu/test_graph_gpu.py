"""Steps replayed from a CUDA graph: the same bits, and interrupted runs end where others do."""

from __future__ import annotations

import pytest
import torch

from spalf.activations import ActivationStore
from spalf.bench.end_to_end import LMShape, language_model, stream
from spalf.bench.problem import Pool, Rounds, Shape, config_for, quiet, run_on, train
from spalf.training.graph import GraphedStep, stepper
from spalf.training.loop import PhaseRun
from spalf.training.phase import enter_phase_two, phase_two

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


LM = LMShape(layers=3, d_model=64, heads=4, d_vocab=997, layer=1)
SMALL = Shape(d_model=64, F=2048, L0=16, batch=4096)


def end_to_end(steps: int, wait: bool = False) -> tuple[list[torch.Tensor], bool]:
    """Weights after so many steps of Phase 2, and whether they were replayed from a graph.

    ``wait`` makes the language model wait for the GPU, which cannot be recorded.
    """
    device = torch.device("cuda")
    model = language_model(LM, device)
    store = ActivationStore(model, stream(LM))
    config = config_for(SMALL, lr=2e-3)
    state, phase = run_on(config, Rounds(store.harvest(0, 16 * 32), SMALL.batch))
    train(state, phase, config, 40)
    enter_phase_two(state, config, store, batches=2)
    if wait:
        model._model.get_input_embeddings().register_forward_hook(wait_for_it)
    run = PhaseRun(state, phase_two(config, store, state.sae, state.step), config, quiet([]))
    for _ in range(steps):
        run.advance()
    step = run._step
    assert isinstance(step, GraphedStep)
    sae = state.sae
    tensors = [sae.W_dec, sae.W_enc, sae.b_enc, sae.log_threshold, state.controller.log_tau]
    return [tensor.detach().clone() for tensor in tensors], step._recorded is not None


def wait_for_it(module: object, inputs: object, output: torch.Tensor) -> None:
    output.sum().item()


def test_phase_two_from_a_graph_is_phase_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across a refresh of the bandwidth, and with the language model's backward pass."""
    replayed, from_a_graph = end_to_end(120)
    assert from_a_graph
    monkeypatch.setattr("spalf.training.graph.WARM_UP_STEPS", 1000)
    one_by_one, from_a_graph = end_to_end(120)
    assert not from_a_graph
    assert all(torch.equal(a, b) for a, b in zip(replayed, one_by_one, strict=True))


def test_a_language_model_that_cannot_be_recorded_is_run_itself() -> None:
    """What was tried leaves nothing behind."""
    waiting, from_a_graph = end_to_end(12, wait=True)
    assert not from_a_graph
    replayed, _ = end_to_end(12)
    assert all(torch.equal(a, b) for a, b in zip(waiting, replayed, strict=True))


def test_a_graph_that_leaves_no_room_for_others_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (-1, 1))
    eager, from_a_graph = end_to_end(12)
    assert not from_a_graph
    monkeypatch.undo()
    replayed, from_a_graph = end_to_end(12)
    assert from_a_graph
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
