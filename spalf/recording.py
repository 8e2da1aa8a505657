"""CUDA graphs: kernels recorded once and replayed without the host launching each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Beginning a recording waits for the whole device, which another thread's may not be made to do.
_one_at_a_time = threading.Lock()


def record(function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record what ``function`` does on the GPU, without doing it.

    Other threads may go on using the GPU meanwhile, each on a stream of its own.

    Args:
        function: has been run before, so that everything it needs is compiled and loaded.

    Returns:
        The graph, and what ``function`` returned: tensors that each replay writes anew.

    Raises:
        RuntimeError: it does something that cannot be recorded, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with _one_at_a_time, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph, result
