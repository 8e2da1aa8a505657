"""Work that a GPU does beside the rest: of one step, or of several SAEs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spalf.recording import training_stream


class Branch:
    """A CUDA stream beside the current one; without one, an ordinary stretch of code.

    A step has some hundreds of kernels that are too small to fill a GPU. On branches they run
    beside the few that read and write whole matrices. What a branch makes may be used after
    `join`; whatever it reads has to live until then.

    Args:
        stream: of the branch.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._begun = False

    @classmethod
    def of_recording(cls) -> Branch:
        """A branch of the CUDA graph that is being recorded, if one is."""
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return cls(training_stream() if recording else None)

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
