"""Says what a lock that is in the way means, and the command that clears it.

Snakemake locks the results it works on, and a killed process leaves its lock. Its own message
cannot tell whether the holder is alive, so each run notes who it is.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

HOLDER = "spalf-holder.json"


def note_holder(state: Path) -> None:
    """Write this process and host into Snakemake's directory ``state``."""
    content = {"pid": os.getpid(), "host": socket.gethostname()}
    (state / HOLDER).write_text(json.dumps(content), encoding="utf-8")


def explain(state: Path) -> None:
    """Tell on standard error whose lock is there, if one is and is not about to be cleared."""
    if "--unlock" not in sys.argv and any((state / "locks").glob("*")):
        sys.stderr.write(f"{message(state)}\n")


def message(state: Path) -> str:
    """One sentence on who holds the lock, one on what to do."""
    try:
        holder = json.loads((state / HOLDER).read_text(encoding="utf-8"))
        pid, host = int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"These results are locked. If no snakemake is working on them: {_REMEDY}"
    if host != socket.gethostname():
        return (
            f"These results are locked by a snakemake on {host}, process {pid}. If it is no longer "
            f"running there: {_REMEDY}"
        )
    if _alive(pid):
        return (
            f"These results are locked by a snakemake that is running, process {pid}: let it work, "
            "or stop it with Ctrl-C where it was started."
        )
    return f"These results are locked by process {pid}, which was killed: {_REMEDY}"


_REMEDY = (
    "run `snakemake --unlock`, then the same command again. Jobs that are still in the queue may "
    "stay there; their results are taken."
)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
