"""Passes of a language model replayed from a CUDA graph.

A pass of a language model is some hundreds of kernels, and Python takes longer to launch them than
a fast GPU to run them; beside a training loop in another thread, longer still.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from spalf.models.huggingface import HuggingFaceModel
from spalf.models.interface import LanguageModel
from spalf.recording import record

logger = logging.getLogger(__name__)

MOST_SHAPES = 4
"""Shapes of tokens for which a graph is kept; each holds the memory of a pass."""

Pass = Callable[[Tensor], Tensor]
"""What a language model makes of int64 tokens ``[n_seq, seq_len]``."""


def replayed(model: LanguageModel, run: Pass) -> Pass:
    """``run``, in the fastest way there is, with the same bits.

    On a GPU a pass is replayed from a graph, for models of the Hugging Face backend. What
    TransformerLens does during a pass is not ours to record.

    Args:
        model: the language model.
        run: its ``activations`` or ``logits``.
    """
    if model.device.type == "cuda" and isinstance(model, HuggingFaceModel):
        return Replayed(model, run)
    return run


class Replayed:
    """A pass of a language model as a CUDA graph for each shape of tokens; any thread may call.

    Args:
        model: on a GPU.
        run: the pass.
    """

    def __init__(self, model: LanguageModel, run: Pass) -> None:
        self._model, self._run = model, run
        self._recorded: dict[tuple[int, ...], _Recorded | None] = {}
        self._lock = threading.Lock()

    def __call__(self, tokens: Tensor) -> Tensor:
        """What the pass makes of int64 ``[n_seq, seq_len]``, a tensor of its own."""
        tokens, shape = tokens.to(self._model.device), tuple(tokens.shape)
        with self._lock:
            known = self._recorded.get(shape)
            if known is not None:
                return known.replay(tokens)
            plain = self._run(tokens)
            if shape not in self._recorded and len(self._recorded) < MOST_SHAPES:
                self._recorded[shape] = _recorded(self._model, self._run, tokens, plain)
            return plain


class _Recorded:
    """A pass over tokens of one shape.

    Args:
        run: has been run on tokens of this shape before.
        tokens: an example.
    """

    def __init__(self, run: Pass, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        self._graph, self._result = record(lambda: run(self._tokens), leave_room=True)
        self._read = torch.cuda.Event()
        self._read.record()

    def replay(self, tokens: Tensor) -> Tensor:
        # The call before this one may have been on another stream.
        self._read.wait()
        self._tokens.copy_(tokens)
        self._graph.replay()
        result = self._result.clone()
        self._read.record()
        return result


def _recorded(
    model: LanguageModel, run: Pass, tokens: Tensor, expected: Tensor
) -> _Recorded | None:
    """The pass as a graph; ``None`` where that does not give the very same bits."""
    try:
        made = _Recorded(run, tokens)
        same = torch.equal(made.replay(tokens), expected)
    except RuntimeError as error:
        logger.info("%s is run kernel by kernel: %s", model.name, str(error).splitlines()[0])
        return None
    if not same:
        logger.info("%s is run kernel by kernel: a graph gives other bits", model.name)
        return None
    return made
