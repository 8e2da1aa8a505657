"""Activations replayed from a CUDA graph.

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

Activations = Callable[[Tensor], Tensor]


def replayed_activations(model: LanguageModel) -> Activations:
    """``model.activations``, in the fastest way there is, with the same bits.

    On a GPU a pass is replayed from a graph, for models of the Hugging Face backend. What
    TransformerLens does during a pass is not ours to record.
    """
    if model.device.type == "cuda" and isinstance(model, HuggingFaceModel):
        return ReplayedActivations(model)
    return model.activations


class ReplayedActivations:
    """`LanguageModel.activations` as a CUDA graph for each shape of tokens; any thread may call.

    Args:
        model: on a GPU.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._recorded: dict[tuple[int, ...], _Pass | None] = {}
        self._lock = threading.Lock()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Float32 ``[n_seq, seq_len, d_model]`` of int64 ``[n_seq, seq_len]``."""
        tokens, shape = tokens.to(self._model.device), tuple(tokens.shape)
        with self._lock:
            known = self._recorded.get(shape)
            if known is not None:
                return known.replay(tokens)
            plain = self._model.activations(tokens)
            if shape not in self._recorded and len(self._recorded) < MOST_SHAPES:
                self._recorded[shape] = _recorded(self._model, tokens, plain)
            return plain


class _Pass:
    """One pass of the model over tokens of one shape.

    Args:
        model: has run on tokens of this shape before.
        tokens: an example.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        self._graph, self._activations = record(lambda: model.activations(self._tokens))
        self._read = torch.cuda.Event()
        self._read.record()

    def replay(self, tokens: Tensor) -> Tensor:
        # The call before this one may have been on another stream.
        self._read.wait()
        self._tokens.copy_(tokens)
        self._graph.replay()
        activations = self._activations.clone()
        self._read.record()
        return activations


def _recorded(model: LanguageModel, tokens: Tensor, expected: Tensor) -> _Pass | None:
    """The pass as a graph; ``None`` where that does not give the very same activations."""
    try:
        made = _Pass(model, tokens)
        same = torch.equal(made.replay(tokens), expected)
    except RuntimeError as error:
        logger.info("%s is run kernel by kernel: %s", model.name, str(error).splitlines()[0])
        return None
    if not same:
        logger.info("%s is run kernel by kernel: a graph gives other bits", model.name)
        return None
    return made
