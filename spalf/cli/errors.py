"""From exceptions to exit statuses: one line for the user, a traceback only with ``--debug``."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import click

from spalf.errors import Busy, Diverged, Interrupted, UserError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 75
"""Exit statuses; 75 (EX_TEMPFAIL) means that running the command again continues it."""


def run_cli(command: click.Command) -> NoReturn:
    """Run a click command and leave the process with the status its outcome calls for."""
    # Until a step has something to save, being asked to stop is a reason to stop at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    try:
        status = status_of(lambda: command.main(standalone_mode=False), "--debug" in sys.argv)
    except SystemExit as exit_:
        if exit_.code != INTERRUPTED:
            raise
        status = INTERRUPTED
    leave(status)


def leave(status: int) -> NoReturn:
    """End the process now; what it made is closed and on the disk.

    Python would first take itself and torch apart: one and a half seconds of processor time, which
    on a busy machine is longer than whoever asked it to stop is going to wait.
    """
    with suppress(OSError, ValueError):  # the log may lie on a full disk, or be closed
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        status = status or FAILED
    os._exit(status)


def status_of(run: Callable[[], object], debug: bool) -> int:
    """Run a command; its exit status, with one line on standard error where it failed.

    With ``debug`` an error is raised instead, for its traceback.
    """
    try:
        run()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.Abort:
        return _say("interrupted", INTERRUPTED)
    except click.ClickException as error:
        return _say(error.format_message(), BAD_INPUT)
    except UserError as error:
        if debug:
            raise
        return _say(str(error), BAD_INPUT)
    except (Interrupted, Busy) as error:
        return _say(str(error), INTERRUPTED)
    except (Diverged, OSError) as error:
        if debug:
            raise
        return _say(_describe(error), FAILED)
    return 0


def _describe(error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = error.filename or "the output directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: the disk is full; free some space and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{where}: cannot be written ({error.strerror}); "
            "mend that and run the same command again, or choose another directory"
        )
    return f"{where}: {error.strerror}"


def _say(message: str, status: int) -> int:
    with suppress(OSError):  # the log may lie on the very disk that is full
        click.echo(f"spalf: {message}", err=True)
    return status
