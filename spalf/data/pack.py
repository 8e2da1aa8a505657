"""From documents to packed sequences of tokens on disk (M17)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spalf.config import DatasetConfig
from spalf.data.sources import Document, documents, is_stdlib
from spalf.data.splits import SHARES, STDLIB_SHARES, Part, split_of
from spalf.data.tokens import INDEX_FILE, TokenSplits
from spalf.errors import UserError

_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 512


def tokenize_dataset(
    dataset: DatasetConfig,
    tokenizer: Any,
    out_dir: Path,
    *,
    seq_len: int,
    train_tokens: int,
    calibration_tokens: int,
    evaluation_tokens: int,
    part: Literal["sae", "lm"] = "sae",
    progress: Callable[[int], None] | None = None,
) -> TokenSplits:
    """Tokenise a dataset into ``train``, ``calibration`` and ``evaluation`` sequences (M17).

    A split takes documents until it has as many tokens as asked, and keeps whole sequences; a
    smaller dataset gives fewer. A document is in one split only. Documents are joined by the
    tokenizer's BOS and EOS; where the two are one token, by one of them.

    Args:
        dataset: where the text comes from.
        tokenizer: a Hugging Face tokenizer.
        out_dir: receives ``train.npy``, ``calibration.npy``, ``evaluation.npy`` of shape
            [n_sequences, seq_len] and, last, ``tokens.json``.
        seq_len: tokens per sequence.
        train_tokens: tokens wanted for training; likewise the next two.
        calibration_tokens: tokens wanted for calibration.
        evaluation_tokens: tokens wanted for evaluation.
        part: "lm" draws ``train`` from the documents set aside for the bundled language models
            (``python-stdlib`` only).
        progress: called with the number of tokens each batch added.

    Raises:
        UserError: the dataset cannot be read, or is too small to give each split one sequence.
    """
    if part == "lm" and not is_stdlib(dataset):
        raise UserError("dataset", dataset.path, "only python-stdlib has an `lm` part")
    out_dir.mkdir(parents=True, exist_ok=True)
    wanted = {
        "train": train_tokens,
        "calibration": calibration_tokens,
        "evaluation": evaluation_tokens,
    }
    dtype = np.dtype("<u2" if len(tokenizer) < 2**16 else "<i4")
    with _Writers(out_dir, wanted, seq_len, dtype) as writers:
        packer = _Packer(tokenizer, writers, progress)
        fingerprint = _fill(dataset, part, writers, packer)
        _require_all(dataset, writers)
        splits = {name: writer.publish() for name, writer in writers.items()}
    info = {
        "dataset": dataset.model_dump(),
        "fingerprint": fingerprint,
        "part": part,
        "python_version": platform.python_version(),
        **_tokenizer_facts(tokenizer),
        "seq_len": seq_len,
        "splits": splits,
    }
    _write_atomically(out_dir / INDEX_FILE, (json.dumps(info, indent=1) + "\n").encode())
    return TokenSplits.open(out_dir)


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer": Path(str(tokenizer.name_or_path)).name,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _fill(dataset: DatasetConfig, part: str, writers: _Writers, packer: _Packer) -> str:
    """Hand every document to its split until all are full; returns a digest of those used."""
    shares = STDLIB_SHARES if is_stdlib(dataset) else SHARES
    names: dict[Part, str] = {"calibration": "calibration", "evaluation": "evaluation"}
    names["lm" if part == "lm" else "train"] = "train"
    digest = hashlib.sha256()
    for batch in _batches(documents(dataset)):
        chosen = [(names.get(split_of(document.key, shares)), document) for document in batch]
        used = [(name, d) for name, d in chosen if name and not writers[name].full]
        for _, document in used:
            digest.update(hashlib.sha256(document.text.encode("utf-8", "replace")).digest())
        packer.add(used)
        if all(writer.full for writer in writers.values()):
            break
    return digest.hexdigest()


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches large enough for fast tokenisation and small enough for memory."""
    batch: list[Document] = []
    characters = 0
    for document in stream:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Packer:
    """Tokenises batches of documents and appends them to their splits."""

    def __init__(
        self, tokenizer: Any, writers: _Writers, progress: Callable[[int], None] | None
    ) -> None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._before = [bos] if bos is not None else []
        self._after = [eos] if eos is not None and eos != bos else []
        self._tokenizer, self._writers, self._progress = tokenizer, writers, progress

    def add(self, batch: list[tuple[str, Document]]) -> None:
        if not batch:
            return
        texts = [document.text for _, document in batch]
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for (name, _), ids in zip(batch, encoded, strict=True):
            self._writers[name].append([*self._before, *ids, *self._after])
        if self._progress is not None:
            self._progress(sum(map(len, encoded)))


class _SplitWriter:
    """Appends tokens to one ``.npy`` file under a temporary name.

    The header is written twice: numpy leaves room in it for the first dimension to grow.
    """

    def __init__(self, path: Path, wanted: int, seq_len: int, dtype: np.dtype[Any]) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._seq_len, self._dtype, self._rest = seq_len, dtype, np.empty(0, dtype)
        self._max_sequences = -(-wanted // seq_len)
        self.sequences = self.documents = 0
        self._file = self._temporary.open("w+b")
        self._write_header()
        self._data_start = self._file.tell()

    @property
    def full(self) -> bool:
        return self.sequences >= self._max_sequences

    def append(self, ids: list[int]) -> None:
        """Add one document; tokens beyond the number wanted are dropped."""
        if self.full:
            return
        self.documents += 1
        tokens = np.concatenate([self._rest, np.asarray(ids, dtype=self._dtype)])
        count = min(len(tokens) // self._seq_len, self._max_sequences - self.sequences)
        self._file.write(tokens[: count * self._seq_len].tobytes())
        self.sequences += count
        self._rest = tokens[count * self._seq_len :]

    def publish(self) -> dict[str, Any]:
        """Finish the file and give it its name; returns the split's entry in ``tokens.json``."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._data_start:
            raise RuntimeError(f"the header of {self._path.name} changed its length")
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return {
            "documents": self.documents,
            "sequences": self.sequences,
            "tokens": self.sequences * self._seq_len,
            "sha256": digest,
        }

    def discard(self) -> None:
        with suppress(OSError):  # of a full disk, said already
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.sequences, self._seq_len),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class _Writers(dict[str, _SplitWriter]):
    """The writers of all splits; what was not published is removed on the way out."""

    def __init__(
        self, out_dir: Path, wanted: dict[str, int], seq_len: int, dtype: np.dtype[Any]
    ) -> None:
        super().__init__(
            (name, _SplitWriter(out_dir / f"{name}.npy", tokens, seq_len, dtype))
            for name, tokens in wanted.items()
        )

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.values():
            writer.discard()


def _require_all(dataset: DatasetConfig, writers: _Writers) -> None:
    for name, writer in writers.items():
        if writer.sequences == 0:
            remedy = (
                f"too small: its {name} split has {writer.documents} documents and not one full "
                "sequence; give more text or a smaller seq_len"
            )
            raise UserError("dataset", dataset.path, remedy)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
