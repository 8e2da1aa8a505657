"""Tokens on disk: seekable streams of fixed-length sequences, one file per split (M17)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spalf.errors import UserError

INDEX_FILE = "tokens.json"


@lru_cache(maxsize=4)
def _epoch_order(n_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch: a permutation that depends on nothing but the arguments."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n_sequences)


class SequenceStream:
    """An endless, seekable stream over the sequences of one split.

    Args:
        tokens: integer array ``[n_sequences, seq_len]``, usually a memory map.
    """

    def __init__(self, tokens: NDArray[Any]) -> None:
        self._tokens = tokens
        self.n_sequences, self.seq_len = tokens.shape

    def sequences(self, start: int, count: int, *, seed: int | None = None) -> torch.Tensor:
        """Sequences ``start`` to ``start + count`` of the stream, int64 ``[count, seq_len]``.

        Index i lies in epoch ``i // n_sequences``. Each epoch visits every sequence once, in an
        order that is a pure function of (seed, epoch), so any position can be read without
        reading what comes before it. With ``seed=None`` every epoch is in file order.
        """
        index = np.arange(start, start + count)
        epoch, position = np.divmod(index, self.n_sequences)
        if seed is not None:
            for e in np.unique(epoch):
                inside = epoch == e
                order = _epoch_order(self.n_sequences, seed, int(e))
                position[inside] = order[position[inside]]
        return torch.from_numpy(self._tokens[position].astype(np.int64))


@dataclass(frozen=True)
class TokenSplits:
    """The three splits that calibration writes and every later step reads.

    Attributes:
        train: sequences the SAE is trained on.
        calibration: sequences that μ, Σ and the thresholds are estimated from.
        evaluation: held-out sequences.
        info: the contents of ``tokens.json``: dataset and its fingerprint, tokenizer, ``seq_len``,
            ``vocab_size``, BOS and EOS ids, and documents, tokens and digest of each split.
    """

    train: SequenceStream
    calibration: SequenceStream
    evaluation: SequenceStream
    info: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> TokenSplits:
        """Open a directory written by `tokenize_dataset` as memory maps.

        Raises:
            UserError: the directory is not one, or a file in it does not match ``tokens.json``.
        """
        directory = Path(directory)
        try:
            info = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
            names = ("train", "calibration", "evaluation")
            streams = {name: _open_split(directory, name, info) for name in names}
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            remedy = f"no usable tokens here ({error}); run `spalf calibrate` again"
            raise UserError("tokens", str(directory), remedy) from None
        return cls(info=info, **streams)


def _open_split(directory: Path, name: str, info: dict[str, Any]) -> SequenceStream:
    path = directory / f"{name}.npy"
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    expected = (info["splits"][name]["sequences"], info["seq_len"])
    if tokens.shape != expected:
        raise ValueError(f"{name}.npy has shape {tokens.shape}, expected {expected}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info["splits"][name]["sha256"]:
            raise ValueError(f"{name}.npy does not match its digest")
    return SequenceStream(tokens)
