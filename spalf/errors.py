"""What can go wrong without being a fault of the program."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, described so that it can be mended.

    The command line prints ``str(error)`` as one line and exits with status 2.

    Args:
        key: what is wrong, as the user wrote it (``train.lr``, ``--device``, a path).
        value: the offending value; ``None`` leaves it out of the message.
        remedy: what to do about it, as a phrase that stands on its own.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        shown = "" if value is None else f" = {_short(value)}"
        super().__init__(" ".join(f"{key}{shown}: {remedy}".split()))


class StopRequested(Exception):
    """The process was asked to stop, between two pieces of work; the step saves and leaves."""


class Interrupted(Exception):
    """A step was asked to stop; it has written a checkpoint and can be continued.

    Args:
        step: units of work done.
        unit: what is counted; optimiser steps unless said otherwise.
    """

    def __init__(self, step: int, unit: str = "step") -> None:
        self.step = step
        super().__init__(f"stopped after {unit} {step}; run the same command again to continue")


class Busy(Exception):
    """Another process is at work on the same output.

    Args:
        directory: the working directory it has locked.
        holder: who it is, in words.
    """

    def __init__(self, directory: object, holder: str) -> None:
        super().__init__(
            f"{directory} is in use by {holder}; "
            "run this again when it has finished, or wait for it with --if-locked wait"
        )


class Diverged(RuntimeError):
    """Something stopped being finite; the state before that step is kept.

    Args:
        step: the optimiser step it happened at, counted from 1 as in the metrics log.
        tensor: what was not finite, in the order of the computation.
        position: where in the stream the step's batch lies.
        remedy: what to do about it.
    """

    def __init__(self, step: int, tensor: str, position: str, remedy: str) -> None:
        self.step, self.tensor, self.position = step, tensor, position
        super().__init__(f"{tensor} not finite at step {step} ({position}): {remedy}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
