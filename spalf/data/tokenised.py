"""Datasets that are tokenised already: arrays of token ids, and columns of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spalf.config import DatasetConfig
from spalf.errors import UserError

Ids = NDArray[np.integer[Any]]

MIN_ROWS = 256
"""A dataset with fewer rows is cut into pieces, so that no split by row stays empty."""

PIECE_TOKENS = 16_384
"""Largest size of those pieces."""

_SMALLEST_PIECE = 128


def array_files(path: Path) -> list[Path]:
    """The ``.npy`` files that a path stands for: itself, or all in a directory, by name."""
    if path.is_dir():
        return sorted(path.glob("*.npy"))
    return [path] if path.suffix == ".npy" and path.is_file() else []


def rows_of_arrays(files: Iterable[Path]) -> Iterator[Ids]:
    """The rows of ``[n_rows, length]`` arrays, or ``[length]`` arrays as one row each.

    The files are read as memory maps.

    Raises:
        UserError: a file is no such array of integers.
    """
    for path in files:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise UserError("dataset", str(path), f"cannot be read: {reason[:200]}") from None
        if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
            remedy = (
                f"holds {array.dtype} of shape {array.shape}; token ids are integers "
                "[length] or [n_rows, length]"
            )
            raise UserError("dataset", str(path), remedy)
        yield from np.atleast_2d(array)


def ids_of_cell(dataset: DatasetConfig, cell: Any) -> Ids:
    """The token ids of one row of a dataset.

    Raises:
        UserError: the column holds something else.
    """
    try:
        ids = np.asarray(cell)
    except ValueError:  # lists of different lengths within a list
        ids = np.empty((0, 0), dtype=object)
    if ids.shape == (0,):
        return ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        kind = type(cell).__name__
        remedy = f"holds {kind}, not lists of token ids; name the column that does"
        raise UserError("dataset.tokens_field", dataset.tokens_field, remedy)
    return ids.astype(np.int64)


def require_known(ids: Ids, n_tokens: int) -> None:
    """Refuse token ids that a tokenizer of ``n_tokens`` tokens does not have.

    Raises:
        UserError: there is one.
    """
    if len(ids) and (ids.min() < 0 or ids.max() >= n_tokens):
        remedy = (
            f"token ids from {ids.min()} to {ids.max()} do not fit the model's tokenizer of "
            f"{n_tokens}; give ids that it made"
        )
        raise UserError("dataset", None, remedy)


def cut_if_few(rows: Iterable[Ids]) -> Iterator[Ids]:
    """The rows as they are, or in about 2·MIN_ROWS pieces if there are only a few."""
    rest = iter(rows)
    head = list(islice(rest, MIN_ROWS))
    if len(head) == MIN_ROWS:
        yield from chain(head, rest)
        return
    size = sum(map(len, head)) // (2 * MIN_ROWS)
    size = min(max(size, _SMALLEST_PIECE), PIECE_TOKENS)
    for row in head:
        for start in range(0, len(row), size):
            yield row[start : start + size]
