"""Steps replayed from a CUDA graph, so that the host does not set the pace.

A step is some hundreds of kernels, many of them tiny; launching them one by one takes longer than
running them. What the schedules say enters the graph as scalars on the device, what a step leaves
behind stays where it is, so one recording serves until the lists of active entries change size or
the sub-threshold mass enters the objective.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
"""Steps done one kernel at a time before one is recorded: kernels are compiled in them."""


def stepper(state: TrainState, phase: Phase, config: RunConfig) -> Callable[[Tensor], StepRecord]:
    """A function that advances ``state`` by a batch, in the fastest way there is.

    On a GPU steps are replayed from a graph; those of Phase 2, which run a language model, where
    that can be recorded.
    """
    kernels = choose(state.sae.W_dec, state.sae.kernel)
    on_a_gpu = state.sae.W_dec.is_cuda and kernels.implementation == "triton"
    if on_a_gpu and phase.recordable:
        return GraphedStep(state, phase, config)
    plan = schedule(config)
    return lambda batch: train_step(state, batch, phase, config, plan)


class GraphedStep:
    """A phase's step as a CUDA graph.

    Args:
        state: advanced in place; its controller's tensors stay the same ones from here on.
        phase: the phase.
        config: the run.
    """

    def __init__(self, state: TrainState, phase: Phase, config: RunConfig) -> None:
        self._state, self._phase, self._config = state, phase, config
        self._plan = schedule(config)
        device = state.stale.device
        self._inputs = StepInputs(*(torch.zeros((), device=device) for _ in range(3)))
        self._filled = StepInputs(0.0, 0.0, 0.0)
        self._control = pack(state.controller)
        state.controller = unpack(self._control, state.controller)
        state.stale = state.stale.clone()
        self._given: tuple[Tensor, ...] = ()
        self._recorded: tuple[torch.cuda.CUDAGraph, tuple[StepRecord, SAEOutput]] | None = None
        self._recordable = True
        self._key: object = None
        self._warm = 0

    def __call__(self, batch: Tensor) -> StepRecord:
        """Advance by one batch, as `train_step` does; the record is overwritten by the next."""
        given = (batch, *self._phase.prepare(batch))
        plain = step_inputs(self._state, self._config, self._plan)
        capacity = self._state.sae.capacity_for(_tokens(batch), float(plain.l0_ref))
        key = (capacity, tuple(tensor.shape for tensor in given), plain.lambda_disc > 0)
        if key != self._key:
            self._key, self._recorded, self._warm, self._given = key, None, 0, ()
        for scalar, before, value in zip(self._inputs, self._filled, plain, strict=True):
            assert isinstance(scalar, Tensor)
            if value != before:
                scalar.fill_(value)
        self._filled = plain
        self._given = self._given or tuple(torch.empty_like(tensor) for tensor in given)
        for kept, tensor in zip(self._given, given, strict=True):
            kept.copy_(tensor)
        if self._recorded is None and self._recordable and self._warm == WARM_UP_STEPS:
            self._recorded = self._record()
        if self._recorded is None:
            with launching():
                step, output = self._on_side_stream()
            self._warm = min(self._warm + 1, WARM_UP_STEPS)
        else:
            graph, (step, output) = self._recorded
            graph.replay()
        finish_step(self._state, output, self._config)
        return step

    def _record(self) -> tuple[torch.cuda.CUDAGraph, tuple[StepRecord, SAEOutput]] | None:
        """The coming step as a graph; ``None`` where that cannot be, now and from now on."""
        if self._phase.number == 1:
            return record(self._advance)
        state = self._state
        controller, stale = state.controller, state.stale
        why = "a graph gives other bits"
        try:
            if self._observes_alike():
                return record(self._advance, leave_room=True)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        logger.info("steps of Phase 2 run kernel by kernel: %s", why)
        state.controller, state.stale = controller, stale
        state.optimizer.zero_grad(set_to_none=True)
        self._recordable = False
        return None

    def _observes_alike(self) -> bool:
        """Whether a recorded forward pass, which runs a language model, gives the same bits."""
        parameters = list(self._state.sae.parameters())

        def look() -> Tensor:
            seen = self._phase.observe(self._state, self._given, None)
            assert seen.kl is not None
            # Only to see that it can be recorded; and it joins what the forward pass left running.
            torch.autograd.grad(seen.error, parameters, allow_unused=True)
            return torch.stack([seen.error.detach(), seen.mse, seen.kl])

        with launching():
            plain = look()
        graph, recorded = record(look)
        graph.replay()
        return torch.equal(plain, recorded)

    def _advance(self) -> tuple[StepRecord, SAEOutput]:
        """One step whose results are written where the last one's were."""
        state, inputs = self._state, self._inputs
        if not self._key[2]:  # type: ignore[index]
            inputs = inputs._replace(lambda_disc=0.0)
        controller, stale = state.controller, state.stale
        done = advance(state, self._given, self._phase, self._config, self._plan, inputs)
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


def _tokens(batch: Tensor) -> int:
    """Tokens in a batch of activations or of sequences."""
    return len(batch) if batch.is_floating_point() else batch.numel()
