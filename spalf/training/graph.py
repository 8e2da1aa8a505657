"""Steps replayed from a CUDA graph, so that the host does not set the pace.

A step is some hundreds of kernels, many of them tiny; launching them one by one takes longer than
running them. What the schedules say enters the graph as scalars on the device, what a step leaves
behind stays where it is, so one recording serves until the lists of active entries change size or
the sub-threshold mass enters the objective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spalf.config import RunConfig, schedule
from spalf.controller.controller import pack, unpack
from spalf.kernels import choose
from spalf.recording import launching, record, training_stream
from spalf.sae import SAEOutput
from spalf.training.phase import Phase
from spalf.training.state import TrainState
from spalf.training.step import (
    StepInputs,
    StepRecord,
    advance,
    finish_step,
    step_inputs,
    train_step,
)

WARM_UP_STEPS = 2
"""Steps done one kernel at a time before one is recorded: kernels are compiled in them."""


def stepper(state: TrainState, phase: Phase, config: RunConfig) -> Callable[[Tensor], StepRecord]:
    """A function that advances ``state`` by a batch, in the fastest way there is.

    Phase 1 on a GPU is replayed from a graph. Phase 2 runs a language model, which is not ours to
    record.
    """
    kernels = choose(state.sae.W_dec, state.sae.kernel)
    if phase.number == 1 and state.sae.W_dec.is_cuda and kernels.implementation == "triton":
        return GraphedStep(state, phase, config)
    plan = schedule(config)
    return lambda batch: train_step(state, batch, phase, config, plan)


class GraphedStep:
    """Phase 1's step as a CUDA graph.

    Args:
        state: advanced in place; its controller's tensors stay the same ones from here on.
        phase: Phase 1.
        config: the run.
    """

    def __init__(self, state: TrainState, phase: Phase, config: RunConfig) -> None:
        self._state, self._phase, self._config = state, phase, config
        self._plan = schedule(config)
        device = state.stale.device
        self._inputs = StepInputs(*(torch.zeros((), device=device) for _ in range(3)))
        self._control = pack(state.controller)
        state.controller = unpack(self._control, state.controller)
        state.stale = state.stale.clone()
        self._batch: Tensor | None = None
        self._recorded: tuple[torch.cuda.CUDAGraph, tuple[StepRecord, SAEOutput]] | None = None
        self._key: object = None
        self._warm = 0

    def __call__(self, batch: Tensor) -> StepRecord:
        """Advance by one batch ``[batch_size, d_model]``; the record is overwritten by the next."""
        plain = step_inputs(self._state, self._config, self._plan)
        capacity = self._state.sae.capacity_for(len(batch), float(plain.l0_ref))
        key = (capacity, batch.shape, plain.lambda_disc > 0)
        if key != self._key:
            self._key, self._recorded, self._warm, self._batch = key, None, 0, None
        for scalar, value in zip(self._inputs, plain, strict=True):
            assert isinstance(scalar, Tensor)
            scalar.fill_(value)
        if self._batch is None:
            self._batch = torch.empty_like(batch)
        self._batch.copy_(batch)
        if self._recorded is None:
            if self._warm < WARM_UP_STEPS:
                with launching():
                    step, output = self._on_side_stream()
                self._warm += 1
                finish_step(self._state, output, self._config)
                return step
            # Another thread may be harvesting on a stream of its own meanwhile.
            self._recorded = record(self._advance)
        graph, (step, output) = self._recorded
        graph.replay()
        finish_step(self._state, output, self._config)
        return step

    def _advance(self) -> tuple[StepRecord, SAEOutput]:
        """One step whose results are written where the last one's were."""
        state, inputs = self._state, self._inputs
        if not self._key[2]:  # type: ignore[index]
            inputs = inputs._replace(lambda_disc=0.0)
        controller, stale = state.controller, state.stale
        assert self._batch is not None
        done = advance(state, self._batch, self._phase, self._config, self._plan, inputs)
        self._control.copy_(pack(state.controller))
        stale.copy_(state.stale)
        state.controller, state.stale = controller, stale
        return done

    def _on_side_stream(self) -> tuple[StepRecord, SAEOutput]:
        """Run a step where a recording will be made, as recordings ask for."""
        side = training_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            done = self._advance()
        torch.cuda.current_stream().wait_stream(side)
        return done
