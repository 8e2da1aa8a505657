"""From exceptions to exit statuses: one line for the user, a traceback only with ``--debug``."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

import click

from spalf.errors import Diverged, Interrupted, UserError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 75
"""Exit statuses; 75 (EX_TEMPFAIL) means that running the command again continues it."""


def run_cli(command: click.Command) -> None:
    """Run a click command and leave the process with the status its outcome calls for."""
    sys.exit(_status(lambda: command.main(standalone_mode=False), "--debug" in sys.argv))


def _status(run: Callable[[], object], debug: bool) -> int:
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
    except Interrupted as error:
        return _say(str(error), INTERRUPTED)
    except (Diverged, OSError) as error:
        if debug:
            raise
        return _say(_describe(error), FAILED)
    return 0


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'output directory'}: the disk is full; free space and rerun"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename}: cannot be written ({error.strerror}); choose another directory"
    return str(error)


def _say(message: str, status: int) -> int:
    click.echo(f"spalf: {message}", err=True)
    return status
