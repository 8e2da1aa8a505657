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
        shown = "" if value is None else f" = {value!r}"
        super().__init__(" ".join(f"{key}{shown}: {remedy}".split()))


class Interrupted(Exception):
    """A step was asked to stop; it has written a checkpoint and can be continued.

    Args:
        step: optimiser steps done.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped after step {step}; run the same command again to continue")


class Diverged(RuntimeError):
    """The loss or a gradient stopped being finite."""
