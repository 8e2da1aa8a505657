"""The metrics log: one JSON object per line, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """Append-only JSON lines with a ``step`` in each.

    No wall-clock time is written, so that a resumed run's log equals an uninterrupted one's.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        """Open the log, dropping rows after step ``resume_at`` and a torn last line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_up_to(path, resume_at) if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, float | int]) -> None:
        """Write one row."""
        self._file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make everything appended so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


def _rows_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line)
    return kept
