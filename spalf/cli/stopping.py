"""SIGTERM and SIGINT as a request to stop after the current piece of work, or at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from spalf.cli.errors import INTERRUPTED

logger = logging.getLogger(__name__)

IMPATIENT_SECONDS = 2.0
"""A second SIGINT within this time is the same key press, sent to the group and by a parent."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Handles the two signals from now on; called, it says whether one has come.

    Asking again with SIGINT, a moment later, ends the process at once. SIGTERM does not: a batch
    system sends it more than once and follows it with SIGKILL itself.

    Python runs its handlers between two of its instructions, so a single long call (reading a
    model, the eigenvectors of a wide covariance) holds them up. A thread that waits for the signal
    itself ends the process during those that have nothing to save, see `nothing_to_lose`.
    """

    def __init__(self) -> None:
        self._asked: list[float] = []
        self._blocks = 0
        received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(received,), daemon=True)
        watch.start()

    def __call__(self) -> bool:
        """Whether the process was asked to stop."""
        return bool(self._asked)

    @contextmanager
    def nothing_to_lose(self) -> Iterator[None]:
        """While it lasts, being asked to stop ends the process at once, with status 75.

        As after SIGKILL, what is on the disk is whole; unlike it, a workflow knows that the same
        command continues.
        """
        self._blocks += 1
        try:
            if self._asked:  # before the thread could know that it may
                _leave()
            yield
        finally:
            self._blocks -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked and number == signal.SIGINT and now - self._asked[0] > IMPATIENT_SECONDS:
            sys.exit(INTERRUPTED)
        if not self._asked:
            logger.warning("%s: stopping after this step", signal.Signals(number).name)
        self._asked.append(now)

    def _watch(self, received: socket.socket) -> None:
        while data := received.recv(1):
            if data[0] in _SIGNALS and self._blocks:
                _leave()


def _leave() -> None:
    with suppress(OSError):  # the log may lie on a full disk
        os.write(2, b"spalf: stopped; run the same command again to continue\n")
    os._exit(INTERRUPTED)  # flushing would wait for a stream that the main thread may hold
