"""Which split a document belongs to: a pure function of its key (M17)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Part = Literal["lm", "train", "calibration", "evaluation"]
Shares = Mapping[Part, int]

SHARES: Shares = MappingProxyType({"train": 90, "calibration": 5, "evaluation": 5})
"""Percent of the documents in each split."""

INSTALLED_SHARES: Shares = MappingProxyType(
    {"lm": 50, "train": 40, "calibration": 5, "evaluation": 5}
)
"""The same for source code that comes with Python, half of which is for language models: the
bundled ones were trained on that half of ``python-stdlib``."""


def split_of(key: str, shares: Shares = INSTALLED_SHARES) -> Part:
    """The split of the document with this key.

    Args:
        key: the document's key (`spalf.data.Document`).
        shares: percent of each split, adding up to 100.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"spalf.split").digest()
    position = int.from_bytes(digest, "big") * 100 // 2**64
    for part, share in shares.items():
        position -= share
        if position < 0:
            return part
    raise ValueError(f"shares = {dict(shares)} must add up to 100")
