"""How far a tokenisation has come, on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spalf.data.writers import sync

logger = logging.getLogger(__name__)


class Journal:
    """The last two positions of a tokenisation, each in a file with a digest of itself.

    Args:
        directory: where the token files are made.
    """

    KEEP = 2

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, read: int, position: Mapping[str, Any]) -> None:
        """Write the position after ``read`` texts; all but the last two are dropped.

        Raises:
            OSError: not writable; earlier positions are untouched.
        """
        text = json.dumps({**position, "read": read}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(self._path(read), f"{digest}\n{text}\n".encode())
        files = self._files()
        # What claims to be later was found unusable, or this run would not be here.
        later = [path for path in files if path.name > self._path(read).name]
        earlier = [path for path in files if path not in later]
        for path in [*later, *earlier[: -self.KEEP]]:
            path.unlink()

    def positions(self) -> Iterator[dict[str, Any]]:
        """Every position that is whole, the newest first; damaged ones are named in a warning."""
        for path in reversed(self._files()):
            digest, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
            text = text.removesuffix("\n")
            if hashlib.sha256(text.encode()).hexdigest() == digest:
                yield json.loads(text)
            else:
                logger.warning("skipping %s: it does not match its digest", path)

    def clear(self) -> None:
        """Remove all positions."""
        for path in self._files():
            path.unlink()

    def _path(self, read: int) -> Path:
        return self._directory / f".position_{read:015d}.json"

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob(".position_*.json"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by rename, synced.

    Raises:
        OSError: not writable; the file is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
