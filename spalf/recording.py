"""CUDA graphs: kernels recorded once and replayed without the host launching each of them.

And branches of such a graph, which run beside the rest of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

T = TypeVar("T")

Precedence = Literal["last", "usual", "first"]
PRIORITY: dict[Precedence, int] = {"last": -1, "usual": -2, "first": -3}
"""Of CUDA streams, the lowest number first."""

_launching = threading.RLock()


@contextmanager
def launching() -> Iterator[None]:
    """Launch kernels one by one where another thread may want to record.

    Beginning a recording waits for the whole device and takes cuBLAS's workspaces away; a thread
    that is between asking for a workspace and using it must not be disturbed so.
    """
    with _launching:
        yield


def training_stream(precedence: Precedence = "usual") -> torch.cuda.Stream:
    """A stream on which no other thread harvests activations.

    There are 32 streams of each priority, handed out in turn, so that two callers may get the same
    one. Harvests take theirs from the lowest priority, which is the default.

    Args:
        precedence: of its kernels over those of other such streams where both wait.
    """
    return torch.cuda.Stream(priority=PRIORITY[precedence])


def record(
    function: Callable[[], T], *, leave_room: bool = False
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record what ``function`` does on the GPU, without doing it.

    Other threads may go on using the GPU meanwhile, each on a stream of its own. Graphs may be
    replayed side by side, as those of a harvest and of a step are: no two share a workspace of
    cuBLAS.

    Args:
        function: has been run before, so that everything it needs is compiled and loaded.
        leave_room: whether as much memory as the graph keeps has to be left on the device, for
            whoever does the same without one.

    Returns:
        The graph, and what ``function`` returned: tensors that each replay writes anew.

    Raises:
        RuntimeError: it does something that cannot be recorded, such as waiting for the device, or
            too little memory is left.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        launching(),
        _workspaces_of_its_own(),
        torch.cuda.graph(graph, stream=training_stream(), capture_error_mode="thread_local"),
    ):
        before = torch.cuda.memory_reserved()
        result = function()
    kept = torch.cuda.memory_reserved() - before
    if leave_room and torch.cuda.mem_get_info()[0] < kept:
        raise RuntimeError("a graph would keep more memory than it leaves")
    return graph, result


@contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """Have cuBLAS ask for new workspaces, in the memory of the graph, and forget them at the end.

    It keeps one for each stream it was called on, and streams come again.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Branch:
    """A branch of the CUDA graph being recorded; where none is, an ordinary stretch of code.

    A step has some hundreds of kernels that are too small to fill a GPU. On branches they run
    beside the few that read and write whole matrices. What a branch makes may be used after
    `join`; whatever it reads has to live until then.

    Args:
        precedence: ``first`` for many small kernels one after another, each of which would
            otherwise wait for a large one to make room; ``last`` for large ones beside which small
            ones go on.
    """

    def __init__(self, precedence: Precedence = "usual") -> None:
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._stream = training_stream(precedence) if recording else None
        self._begun = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What runs in here follows what came before it, and nothing else."""
        if self._stream is None:
            yield
            return
        self._begun = True
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What follows comes after the branch."""
        if self._stream is not None and self._begun:
            torch.cuda.current_stream().wait_stream(self._stream)
