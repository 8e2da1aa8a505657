"""Work that a recorded step does beside the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """A branch of the CUDA graph being recorded; where none is, an ordinary stretch of code.

    A step has some hundreds of kernels that are too small to fill a GPU. On branches they run
    beside the few that read and write whole matrices. What a branch makes may be used after
    `join`; whatever it reads has to live until then.
    """

    def __init__(self) -> None:
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._stream = torch.cuda.Stream() if recording else None
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
