"""Which revision of the code runs. Needs no torch, unlike `spalf.cli.runtime`."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Revision of the source tree the package runs from, or an empty string outside one."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
