"""The text of a token, as it stands in a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token, with the space before it where there is one.

    Many tokenizers drop the leading space of what they decode, so each token is decoded after
    another one and that one's text is taken off. A token that is part of a character has no text
    of its own; it is shown as the tokenizer writes it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: token ids.
    """
    lead = tokenizer.encode("a", add_special_tokens=False)[-1:]
    if not lead or not ids:
        return [_decode(tokenizer, [[i]])[0] for i in ids]
    before = _decode(tokenizer, [lead])[0]
    alone = _decode(tokenizer, [[i] for i in ids])
    after = _decode(tokenizer, [[*lead, i] for i in ids])
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    texts = []
    for single, joined, piece in zip(alone, after, pieces, strict=True):
        text = joined.removeprefix(before) if joined.startswith(before) else single
        texts.append(str(piece) if not text or _REPLACEMENT in text else text)
    return texts


def _decode(tokenizer: Any, sequences: list[list[int]]) -> list[str]:
    return [
        str(text)
        for text in tokenizer.batch_decode(
            sequences, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    ]
