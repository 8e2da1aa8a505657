"""From documents to packed sequences of tokens on disk (M17)."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from spalf.config import DatasetConfig
from spalf.data.journal import Journal, write_atomically
from spalf.data.sources import Document, documents, is_installed, pieces
from spalf.data.splits import INSTALLED_SHARES, SHARES, Part, split_of
from spalf.data.tokenised import Ids, require_known
from spalf.data.tokens import INDEX_FILE, TokenSplits
from spalf.data.writers import SplitWriter, Unusable
from spalf.errors import StopRequested, UserError

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 2**20
_BATCH_TEXTS = 512
_HUGE_CHARACTERS = 2**20
"""A document of more is tokenised in pieces, so that no call takes long or much memory."""


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
    save_due: Callable[[int], bool] | None = None,
) -> TokenSplits:
    """Tokenise a dataset into ``train``, ``calibration`` and ``evaluation`` sequences (M17).

    A split takes documents until it has as many tokens as asked, and keeps whole sequences; a
    smaller dataset gives fewer. A document is in one split only. Documents are joined by the
    tokenizer's BOS and EOS; where the two are one token, by one of them. A document of more than
    a mebicharacter is tokenised in pieces of about half of that. Of a dataset that is tokenised
    already the token ids are taken as they are, and nothing is put between them.

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
            (``python-stdlib`` and ``python-packages`` only).
        progress: called with the number of tokens each batch added. If it raises
            `StopRequested`, the position is saved first.
        save_due: asked after each batch, with their number, whether to save the position. Where
            it is given, an interrupted call can be repeated and continues from the last position
            saved, bit for bit; without it, nothing is left of an interrupted call.

    Raises:
        UserError: the dataset cannot be read, or is too small to give each split one sequence.
        StopRequested: from ``progress``.
    """
    if part == "lm" and not is_installed(dataset):
        remedy = "only python-stdlib and python-packages have an `lm` part"
        raise UserError("dataset", dataset.path, remedy)
    out_dir.mkdir(parents=True, exist_ok=True)
    wanted = {
        "train": train_tokens,
        "calibration": calibration_tokens,
        "evaluation": evaluation_tokens,
    }
    dtype = np.dtype("<u2" if len(tokenizer) < 2**16 else "<i4")
    journal = Journal(out_dir) if save_due else None
    name_of = _names(dataset, part)
    with _Writers(out_dir, wanted, seq_len, dtype, keep=journal is not None) as writers:
        fingerprint = _Filling(
            batches=lambda: _batches(_texts(documents(dataset), name_of)),
            packer=_Packer(tokenizer, writers),
            writers=writers,
            journal=journal,
            progress=progress or (lambda _: None),
            save_due=save_due or (lambda _: False),
        ).run()
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
    write_atomically(out_dir / INDEX_FILE, (json.dumps(info, indent=1) + "\n").encode())
    if journal:
        journal.clear()
    return TokenSplits.open(out_dir)


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer": Path(str(tokenizer.name_or_path)).name,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _names(dataset: DatasetConfig, part: str) -> Callable[[Document], str | None]:
    """Which file a document goes into, if any."""
    shares = INSTALLED_SHARES if is_installed(dataset) else SHARES
    files: dict[Part, str] = {"calibration": "calibration", "evaluation": "evaluation"}
    files["lm" if part == "lm" else "train"] = "train"
    return lambda document: files.get(split_of(document.key, shares))


class _Text(NamedTuple):
    """A document, or a piece of a huge one: what is tokenised in one go, or is already."""

    name: str | None
    text: str
    first: bool
    last: bool
    ids: Ids | None = None

    @property
    def size(self) -> int:
        """Characters, or tokens where it is tokenised already."""
        return len(self.text) if self.ids is None else len(self.ids)

    @property
    def content(self) -> bytes:
        """What tells it from another."""
        if self.ids is None:
            return self.text.encode("utf-8", "replace")
        return self.ids.astype("<i8").tobytes()


def _texts(
    stream: Iterable[Document], name_of: Callable[[Document], str | None]
) -> Iterator[_Text]:
    for document in stream:
        name, text = name_of(document), document.text
        if len(text) <= _HUGE_CHARACTERS:
            yield _Text(name, text, True, True, document.ids)
            continue
        start = 0
        for piece in pieces(text, _HUGE_CHARACTERS // 2):
            end = start + len(piece)
            yield _Text(name, piece, start == 0, end == len(text))
            start = end


def _batches(stream: Iterable[_Text]) -> Iterator[list[_Text]]:
    """Batches large enough for fast tokenisation and small enough for memory."""
    batch: list[_Text] = []
    characters = 0
    for text in stream:
        batch.append(text)
        characters += text.size
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass
class _Filling:
    """Hands every text to its split until all are full; can be left and taken up between batches.

    Attributes:
        batches: makes the batches of the dataset, from its start.
        packer: tokenises them.
        writers: one for each split.
        journal: where positions are kept; ``None`` keeps none.
        progress: called with the tokens each batch added, 0 for one that is only read again.
        save_due: asked after each batch, with the number of batches.
    """

    batches: Callable[[], Iterator[list[_Text]]]
    packer: _Packer
    writers: _Writers
    journal: Journal | None
    progress: Callable[[int], None]
    save_due: Callable[[int], bool]
    _read: int = field(init=False, default=0)
    _digest: Any = field(init=False, default=None)

    def run(self) -> str:
        """Fill the splits; returns a digest of the texts used."""
        for position in self.journal.positions() if self.journal else ():
            try:
                return self._from(position)
            except Unusable as reason:
                logger.warning("not resuming after %d texts: %s", position["read"], reason)
        return self._from(None)

    def _from(self, position: Mapping[str, Any] | None) -> str:
        """Fill the splits from a position, or from the start.

        What lies before the position is read again, not tokenised again: that takes little time,
        and shows whether the dataset is still the same.
        """
        resume_at = position["read"] if position else 0
        for name, writer in self.writers.items():
            if position:
                writer.resume(position["splits"][name])
            else:
                writer.start()
        if position:
            logger.info("resuming tokenisation after %d texts", resume_at)
        self._read, self._digest = 0, hashlib.sha256()
        for number, batch in enumerate(self.batches(), start=1):
            again = self._read < resume_at
            self._take(batch, again)
            if position and again and self._read >= resume_at:
                self._require_same(position)
            self._after(number, again)
            if all(writer.full_at(self._read) for writer in self.writers.values()):
                break
        if position and self._read < resume_at:
            raise Unusable("the dataset has become shorter")
        for writer in self.writers.values():
            writer.trim()
        self._save()
        return self._digest.hexdigest()

    def _take(self, batch: list[_Text], again: bool) -> None:
        writers = self.writers
        used = [text for text in batch if text.name and not writers[text.name].full_at(self._read)]
        for text in used:
            self._digest.update(hashlib.sha256(text.content).digest())
        if not again:
            self.packer.add(used)
        self._read += len(batch)
        for writer in writers.values():
            if not again and writer.full and writer.filled_at is None:
                writer.filled_at = self._read

    def _require_same(self, position: Mapping[str, Any]) -> None:
        same = (
            self._read == position["read"] and self._digest.hexdigest() == position["fingerprint"]
        )
        if not same:
            raise Unusable("the dataset has changed")

    def _after(self, number: int, again: bool) -> None:
        """Between two batches: somebody may ask to stop, and a position may be due."""
        try:
            self.progress(0 if again else self.packer.added)
        except StopRequested:
            if not again:
                self._save()
            raise
        if not again and self.save_due(number):
            self._save()

    def _save(self) -> None:
        if self.journal is None:
            return
        splits = {name: writer.state() for name, writer in self.writers.items()}
        position = {"fingerprint": self._digest.hexdigest(), "splits": splits}
        self.journal.save(self._read, position)


class _Packer:
    """Tokenises batches of texts and appends them to their splits.

    Attributes:
        added: tokens of the last batch.
    """

    def __init__(self, tokenizer: Any, writers: _Writers) -> None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._before = [bos] if bos is not None else []
        self._after = [eos] if eos is not None and eos != bos else []
        self._tokenizer, self._writers, self.added = tokenizer, writers, 0

    def add(self, batch: list[_Text]) -> None:
        """Append a batch of texts that all have a split."""
        self.added = 0
        for text in batch:
            if text.ids is not None:
                require_known(text.ids, len(self._tokenizer))
                self._writers[str(text.name)].append(text.ids, first=text.first)
                self.added += len(text.ids)
        self._tokenize([text for text in batch if text.ids is None])

    def _tokenize(self, batch: list[_Text]) -> None:
        if not batch:
            return
        encoded = self._tokenizer(
            [text.text for text in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for text, ids in zip(batch, encoded, strict=True):
            before = self._before if text.first else []
            after = self._after if text.last else []
            self._writers[str(text.name)].append([*before, *ids, *after], first=text.first)
        self.added += sum(map(len, encoded))


class _Writers(dict[str, SplitWriter]):
    """The writers of all splits.

    On the way out, what was not published is removed, unless a position in it is kept.
    """

    def __init__(
        self, out_dir: Path, wanted: dict[str, int], seq_len: int, dtype: np.dtype[Any], keep: bool
    ) -> None:
        super().__init__(
            (name, SplitWriter(out_dir / f"{name}.npy", tokens, seq_len, dtype))
            for name, tokens in wanted.items()
        )
        self._keep = keep

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        bad_input = kind is not None and issubclass(kind, UserError)
        for writer in self.values():
            if self._keep and kind is not None and not bad_input:
                writer.close()
            else:
                writer.discard()


def _require_all(dataset: DatasetConfig, writers: _Writers) -> None:
    for name, writer in writers.items():
        if writer.sequences == 0:
            remedy = (
                f"too small: its {name} split has {writer.documents} documents and not one full "
                "sequence; give more text or a smaller seq_len"
            )
            raise UserError("dataset", dataset.path, remedy)
