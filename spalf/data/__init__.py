"""Data: documents, splits by document, and packed token sequences on disk (M17)."""

from spalf.data.pack import tokenize_dataset
from spalf.data.sources import Document, documents, is_on_hub
from spalf.data.splits import Part, split_of
from spalf.data.tokens import SequenceStream, TokenSplits

__all__ = [
    "Document",
    "Part",
    "SequenceStream",
    "TokenSplits",
    "documents",
    "is_on_hub",
    "split_of",
    "tokenize_dataset",
]
