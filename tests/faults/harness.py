"""Runs ``spalf`` in a forked child, where it can be killed at an exact point of its work.

Forking from a process that has imported everything costs milliseconds where starting Python and
torch costs seconds, which is what makes hundreds of kills affordable. Nothing of this is in the
package: the child patches the functions it wants to be killed in before it calls the command line.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

COMMANDS = ("spalf", "spalf-train", "spalf-eval")


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status, or minus the signal that killed it, and what it said."""

    status: int
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.errors.splitlines()


def command(name: str) -> click.Command:
    from spalf.cli import main, run

    return {
        "spalf": main.spalf,
        "spalf-train": run.train_command,
        "spalf-eval": run.evaluate_command,
    }[name]


@dataclass
class Child:
    """A forked ``spalf`` that may still be running."""

    pid: int
    errors: Path

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> Outcome:
        deadline = time.monotonic() + timeout
        while True:
            done, raw = os.waitpid(self.pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end in {timeout} s: {self.errors.read_text()}")
            time.sleep(0.005)
        # One that was killed before it could say anything has no file.
        said = self.errors.read_text(errors="replace") if self.errors.exists() else ""
        return Outcome(os.waitstatus_to_exitcode(raw), said)


def start(
    arguments: list[str],
    errors: Path,
    prepare: Callable[[], None] | None = None,
    uid: int | None = None,
) -> Child:
    """Fork a child that runs ``arguments`` (``["spalf", "phase1", …]``) after ``prepare``."""
    pid = os.fork()
    if pid:
        return Child(pid, errors)
    status = 70
    try:
        _become_a_process(errors)
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        if prepare is not None:
            prepare()
        status = _main(arguments)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        status = 1
        with suppress(OSError):
            traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def run(
    arguments: list[str],
    errors: Path,
    prepare: Callable[[], None] | None = None,
    uid: int | None = None,
) -> Outcome:
    """`start`, and wait for the end."""
    return start(arguments, errors, prepare, uid).wait()


def in_child(function: Callable[[], object]) -> None:
    """Call a function that computes in a child: a parent with threads could not fork safely."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _become_a_process(errors: Path) -> None:
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    import logging

    logging.root.handlers.clear()


def _main(arguments: list[str]) -> int:
    from spalf.cli import errors as cli_errors
    from spalf.cli import runtime

    # The revision of the source tree may change while the tests run.
    runtime.commit = lambda: ""
    sys.argv = [*arguments]
    try:
        cli_errors.run_cli(_with_arguments(command(arguments[0]), arguments[1:]))
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    return 0


class _with_arguments:
    """A click command that is called with fixed arguments."""

    def __init__(self, wrapped: click.Command, arguments: list[str]) -> None:
        self._wrapped, self._arguments = wrapped, arguments

    def main(self, standalone_mode: bool) -> Any:
        return self._wrapped.main(
            args=self._arguments, prog_name="spalf", standalone_mode=standalone_mode
        )


class Events:
    """Counts what a run does to the disk and to its state, and kills it at the n-th event.

    Before the event, after it or, for a file that is being written, in the middle of it.
    """

    def __init__(self, kill_at: int | None, counter: Path | None = None) -> None:
        self.seen, self._kill_at, self._counter = 0, kill_at, counter

    def install(self) -> None:
        from sae_lens import SAETrainer

        from spalf import evaluation
        from spalf.activations import ActivationStore
        from spalf.checkpoint import files
        from spalf.data import pack
        from spalf.training import graph
        from spalf.whitening import SplitHalfCovariance

        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "rename"),
            (os, "unlink"),
            (os, "link"),
            (os, "mkdir"),
            (ActivationStore, "sequences"),
            (SplitHalfCovariance, "update"),
            (pack._Packer, "add"),
            (pack.SplitWriter, "publish"),
            (evaluation.DownstreamMeasurement, "add"),
            (evaluation.AbsorptionMeasurement, "add"),
            (evaluation.ProbingMeasurement, "add"),
            (graph, "train_step"),
            (SAETrainer, "step"),
            (files, "save_file"),
            (sys.modules["spalf.steps.evaluate"], "write_json"),
        ):
            setattr(owner, name, self._counted(getattr(owner, name)))
        pack._BATCH_CHARACTERS = 2**15  # many batches of a small corpus
        files.save_file = self._torn(files.save_file)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._event()
            result = function(*args, **kwargs)
            self._event()
            return result

        return counted

    def _torn(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """A save that can be killed with half of the file on the disk."""

        def torn(tensors: Any, path: Path) -> None:
            save(tensors, path)
            if self.seen + 1 == self._kill_at:
                os.truncate(path, path.stat().st_size // 2)
            self._event()

        return torn

    def _event(self) -> None:
        self.seen += 1
        if self._counter is not None:
            self._counter.write_text(str(self.seen))
        if self.seen == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def mounted_tmpfs(directory: Path, size: str) -> Iterator[bool]:
    """A small tmpfs on ``directory``; yields whether mounting is permitted here."""
    import subprocess

    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", str(directory)], check=False)
