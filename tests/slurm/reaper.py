"""Ends a cluster when the process that booted it closes the pipe, or ends in whatever way.

Example: python -m tests.slurm.reaper accounting.AccountedCluster /tmp/slurm-x 10
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path


def main() -> None:
    kind, root, index = sys.argv[1:]
    module, name = kind.split(".")
    sys.stdin.read()
    cluster = getattr(importlib.import_module(f"tests.slurm.{module}"), name)
    cluster(Path(root), int(index)).stop()
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
