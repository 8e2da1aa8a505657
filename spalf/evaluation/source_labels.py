"""What every token of Python source is: in a string, in a comment, a keyword, how far indented.

The labels come from `tokenize` of the standard library, character by character, and go to the
tokens of a language model by the characters they stand for.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TASKS = (
    "in_string",
    "in_comment",
    "keyword",
    "indent_0",
    "indent_1",
    "indent_2",
    "indent_3_or_more",
)
"""Yes-or-no questions about a token; the last four are one question, the depth of indentation."""

_STRING, _COMMENT, _KEYWORD, _INDENT = range(4)
_DEEPEST = 3
_OPENS = {getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START")}
_CLOSES = {getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END")}

Encode = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]
"""From a text to token ids and the characters, first and one past the last, of each."""


@dataclass(frozen=True, eq=False)
class TokenLabels:
    """Labels of a stream of tokens.

    Attributes:
        answers: bool ``[n_tokens, len(TASKS)]``.
        document: number of the document each token is of, int32 ``[n_tokens]``; −1 for a token
            that has no labels, because it separates documents or its document is not Python.
    """

    answers: NDArray[np.bool_]
    document: NDArray[np.int32]


def encoder(tokenizer: Any) -> Encode | None:
    """How a Hugging Face tokenizer encodes, with characters; ``None`` if it cannot say them."""
    if not getattr(tokenizer, "is_fast", False):
        return None

    def encode(text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoded = tokenizer(text, **options)
        return encoded["input_ids"], encoded["offset_mapping"]

    return encode


def label_tokens(
    tokens: NDArray[Any],
    separators: Sequence[int],
    decode: Callable[[list[int]], str],
    encode: Encode,
    wanted: NDArray[np.bool_] | None = None,
) -> TokenLabels:
    """Label a stream of packed documents.

    A document that is not valid Python, or that the tokenizer would encode in another way than it
    is found, has no labels.

    Args:
        tokens: ids ``[n_tokens]``.
        separators: ids that stand between documents.
        decode: from ids to text.
        encode: inverse of ``decode``.
        wanted: which tokens need labels ``[n_tokens]``; documents with none of them are passed
            over.
    """
    answers = np.zeros((tokens.shape[0], len(TASKS)), dtype=np.bool_)
    document = np.full(tokens.shape[0], -1, dtype=np.int32)
    for number, (start, end) in enumerate(_documents(tokens, separators)):
        if wanted is not None and not wanted[start:end].any():
            continue
        ids = tokens[start:end].tolist()
        text = decode(ids)
        if not _is_python(text):
            continue
        again, spans = encode(text)
        if list(again) != ids:
            continue
        answers[start:end] = _of_tokens(text, spans)
        document[start:end] = number
    return TokenLabels(answers, document)


def _documents(tokens: NDArray[Any], separators: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and one past the last token of each stretch without separators."""
    edges = np.flatnonzero(np.isin(tokens, separators))
    starts = np.concatenate([[0], edges + 1])
    ends = np.concatenate([edges, [tokens.shape[0]]])
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end > start:
            yield start, end


def _is_python(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler thinks of old code is no matter
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _of_tokens(text: str, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """The labels of each token are those of its first character that is no blank, if it has one."""
    of_characters = label_characters(text)
    chosen = np.zeros(len(spans), dtype=np.int64)
    for index, (start, end) in enumerate(spans):
        inside = text[start:end]
        blanks = len(inside) - len(inside.lstrip())
        chosen[index] = start + (blanks if blanks < len(inside) else 0)
    return of_characters[np.minimum(chosen, len(text) - 1)]


def label_characters(text: str) -> NDArray[np.bool_]:
    """The answers to `TASKS` for every character of Python source, bool ``[len(text), tasks]``.

    An f-string is a string from its first quote to its last, whatever is in between. The depth is
    that of the block a line is in; comments and empty lines between two statements count to the
    block of the first.

    Args:
        text: source that parses.
    """
    found = np.zeros((len(text), _INDENT), dtype=np.bool_)
    depth = np.zeros(len(text), dtype=np.int64)
    # Characters are counted by line, as the tokenizer does, whatever ends a line.
    lines = np.cumsum([0, *map(len, io.StringIO(text))])
    level = before = open_strings = opened_at = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = (
            min(len(text), int(lines[min(row, len(lines)) - 1]) + column)
            for row, column in (token.start, token.end)
        )
        level += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type not in (tokenize.INDENT, tokenize.DEDENT):
            depth[before:end] = level
            before = max(before, end)
        if token.type in _OPENS:
            opened_at = opened_at if open_strings else start
            open_strings += 1
        elif token.type in _CLOSES:
            open_strings -= 1
            found[opened_at:end, _STRING] = True
        elif token.type == tokenize.STRING:
            found[start:end, _STRING] = True
        elif token.type == tokenize.COMMENT:
            found[start:end, _COMMENT] = True
        elif token.type == tokenize.NAME and keyword.iskeyword(token.string) and not open_strings:
            found[start:end, _KEYWORD] = True
    depths = np.minimum(depth, _DEEPEST)[:, None] == np.arange(_DEEPEST + 1)
    return np.concatenate([found, depths], axis=1)
