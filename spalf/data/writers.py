"""Token files as they are written: append, say how far they are, go on from there, publish."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_READ_BYTES = 2**24


class Unusable(Exception):
    """A position that cannot be continued from; says why."""


class SplitWriter:
    """Appends tokens to one ``.npy`` file under a hidden name.

    The header is written twice: numpy leaves room in it for the first dimension to grow.

    Args:
        path: the file to make.
        wanted: tokens wanted, rounded up to whole sequences.
        seq_len: tokens per sequence.
        dtype: of the file.
    """

    def __init__(self, path: Path, wanted: int, seq_len: int, dtype: np.dtype[Any]) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._seq_len, self._dtype = seq_len, dtype
        self._wanted = -(-wanted // seq_len) * seq_len
        self._file: io.BufferedRandom | None = None
        self._reset()

    def _reset(self) -> None:
        self.tokens = self.documents = 0
        self.filled_at: int | None = None
        self._hash = hashlib.sha256()

    @property
    def sequences(self) -> int:
        """Whole sequences so far."""
        return self.tokens // self._seq_len

    @property
    def full(self) -> bool:
        """Whether it has as many tokens as wanted."""
        return self.tokens >= self._wanted

    def full_at(self, position: int) -> bool:
        """Whether it was full when ``position`` texts had been read."""
        return self.filled_at is not None and self.filled_at <= position

    def start(self) -> None:
        """Begin an empty file.

        Raises:
            OSError: it cannot be written.
        """
        self._close()
        self._reset()
        self._file = self._partial.open("w+b")
        self._write_header(self._file)
        self._data_start = self._file.tell()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state` was taken.

        Raises:
            Unusable: the file is missing, shorter, or not the one that was written.
        """
        self._close()
        self._reset()
        if not self._partial.exists() and self._path.exists():
            self._path.replace(self._partial)  # killed between two files' publication
        try:
            self._file = self._partial.open("r+b")
        except FileNotFoundError:
            raise Unusable(f"{self._partial} is missing") from None
        self._write_header(self._file)
        self._data_start = self._file.tell()
        self.tokens, self.documents = state["tokens"], state["documents"]
        self.filled_at = state["filled_at"]
        if not self._hash_written() or self._hash.hexdigest() != state["sha256"]:
            raise Unusable(f"{self._partial} does not match its digest")
        self._file.truncate(self._file.tell())

    def append(self, ids: list[int] | NDArray[np.integer[Any]], *, first: bool) -> None:
        """Add one text; tokens beyond the number wanted are dropped.

        Args:
            ids: its tokens.
            first: whether a document begins with it.
        """
        if self.full:
            return
        self.documents += first
        data = np.asarray(ids[: self._wanted - self.tokens], dtype=self._dtype)
        self._open_file.write(data.tobytes())
        self._hash.update(data.tobytes())
        self.tokens += len(data)

    def trim(self) -> None:
        """Leave out the last sequence where it is not whole; nothing is appended after that.

        The file keeps it until it is published, so that earlier states can still be resumed.
        """
        whole = self.sequences * self._seq_len
        if whole < self.tokens:
            self.tokens = whole
            self._open_file.seek(self._data_start)
            self._hash_written()

    def _hash_written(self) -> bool:
        """Hash ``tokens`` tokens from where the file stands; whether there are so many."""
        self._hash = hashlib.sha256()
        left = self.tokens * self._dtype.itemsize
        while left and (block := self._open_file.read(min(left, _READ_BYTES))):
            self._hash.update(block)
            left -= len(block)
        return left == 0

    def state(self) -> dict[str, Any]:
        """What `resume` needs; what it speaks of is on the disk when this returns."""
        sync(self._open_file)
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "filled_at": self.filled_at,
            "sha256": self._hash.hexdigest(),
        }

    def publish(self) -> dict[str, Any]:
        """Finish the file and give it its name; returns the split's entry in ``tokens.json``."""
        file = self._open_file
        file.seek(0)
        self._write_header(file)
        if file.tell() != self._data_start:
            raise RuntimeError(f"the header of {self._path.name} changed its length")
        file.truncate(self._data_start + self.sequences * self._seq_len * self._dtype.itemsize)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        sync(file)
        self._close()
        self._partial.replace(self._path)
        return {
            "documents": self.documents,
            "sequences": self.sequences,
            "tokens": self.sequences * self._seq_len,
            "sha256": digest,
        }

    def discard(self) -> None:
        """Remove what was not published."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the file as it is."""
        self._close()

    @property
    def _open_file(self) -> io.BufferedRandom:
        if self._file is None:
            raise RuntimeError(f"{self._path.name} is not open")
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # of a full disk, said already
                file.raw.close()

    def _write_header(self, file: io.BufferedRandom) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.sequences, self._seq_len),
        }
        np.lib.format.write_array_header_1_0(file, header)


def sync(file: IO[bytes]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())
