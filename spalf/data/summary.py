"""What tokens on disk hold, and what a dataset would give: in words, for a look before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from spalf.config import DatasetConfig
from spalf.data.sources import Document, documents, is_installed
from spalf.data.splits import INSTALLED_SHARES, SHARES, split_of
from spalf.data.tokenised import require_known
from spalf.data.tokens import TokenSplits

Decode = Callable[[list[int]], str]

EDGE_TOKENS = 12
"""Tokens shown at either end of a split."""


@dataclass(frozen=True)
class SplitSummary:
    """One split of a dataset.

    Attributes:
        name: ``train``, ``calibration`` or ``evaluation``.
        documents: documents that lie in it, the last one perhaps in part.
        sequences: whole sequences; ``None`` where none are cut yet.
        tokens: tokens in them.
        share: of the tokens of all splits.
        begins: its first tokens, as text.
        ends: its last tokens.
    """

    name: str
    documents: int
    sequences: int | None
    tokens: int
    share: float
    begins: str
    ends: str


def summarise_tokens(splits: TokenSplits, decode: Decode) -> list[SplitSummary]:
    """The three splits of a directory of tokens, with the text at their boundaries.

    Args:
        splits: as opened; every file has been compared with its digest.
        decode: from token ids to text.
    """
    entries = splits.info["splits"]
    total = sum(entry["tokens"] for entry in entries.values())
    rows = []
    for name, entry in entries.items():
        stream = getattr(splits, name)
        first = stream.sequences(0, 1)[0, :EDGE_TOKENS]
        last = stream.sequences(stream.n_sequences - 1, 1)[0, -EDGE_TOKENS:]
        rows.append(
            SplitSummary(
                name=name,
                documents=entry["documents"],
                sequences=entry["sequences"],
                tokens=entry["tokens"],
                share=entry["tokens"] / total,
                begins=decode(first.tolist()),
                ends=decode(last.tolist()),
            )
        )
    return rows


def read_documents(
    dataset: DatasetConfig, tokenizer: Any, limit: int
) -> dict[str, list[list[int]]]:
    """Token ids of the first documents of a dataset, by the split that each lies in.

    Args:
        dataset: where the text comes from.
        tokenizer: a Hugging Face tokenizer.
        limit: documents to read.

    Raises:
        UserError: the dataset cannot be read, or its token ids are of another tokenizer.
    """
    shares = INSTALLED_SHARES if is_installed(dataset) else SHARES
    found: dict[str, list[list[int]]] = {name: [] for name in shares}
    for document in islice(documents(dataset), limit):
        found[split_of(document.key, shares)].append(_ids(document, tokenizer))
    return found


def _ids(document: Document, tokenizer: Any) -> list[int]:
    if document.ids is not None:
        require_known(document.ids, len(tokenizer))
        return [int(token) for token in document.ids]
    encoded = tokenizer(document.text, add_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


def summarise_documents(
    found: Mapping[str, Sequence[list[int]]], decode: Decode
) -> list[SplitSummary]:
    """What documents would give each split, with the text at their boundaries.

    Args:
        found: as `read_documents` gives them.
        decode: from token ids to text.
    """
    tokens = {name: sum(map(len, texts)) for name, texts in found.items()}
    total = sum(tokens.values())
    return [
        SplitSummary(
            name=name,
            documents=len(texts),
            sequences=None,
            tokens=tokens[name],
            share=tokens[name] / total if total else 0.0,
            begins=decode(texts[0][:EDGE_TOKENS]) if texts else "",
            ends=decode(texts[-1][-EDGE_TOKENS:]) if texts else "",
        )
        for name, texts in found.items()
    ]
