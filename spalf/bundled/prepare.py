"""Prepare the data of the bundled language models: a tokenizer and packed tokens.

    python -m spalf.bundled.prepare --out DIR

writes ``DIR/tokenizer`` (byte-level BPE in Hugging Face format, trained on the ``lm`` part of the
dataset) and ``DIR/{train,calibration,evaluation}.npy`` with ``tokens.json``, where ``train`` is
that part. `spalf.bundled.train_lm` needs nothing else. The bundled models were made from
``python-stdlib``; ``--dataset python-packages`` is some twenty times as much text.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spalf.config import DatasetConfig
from spalf.data import TokenSplits, documents, split_of, tokenize_dataset

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARACTERS = 2**25
"""Text that a tokenizer is trained on at most: all of the standard library's part and more."""

_log = logging.getLogger(__name__)


def train_tokenizer(dataset: DatasetConfig, vocab_size: int, directory: Path) -> Any:
    """Train a byte-level BPE tokenizer on the ``lm`` part of a dataset and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(dataset), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def _texts(dataset: DatasetConfig) -> Iterator[str]:
    read = 0
    for document in documents(dataset):
        if split_of(document.key) == "lm" and read < TOKENIZER_CHARACTERS:
            read += len(document.text)
            yield document.text


def prepare(
    dataset: DatasetConfig, out: Path, *, vocab_size: int = 2048, seq_len: int = 256
) -> TokenSplits:
    """Write the tokenizer and all tokens of the ``lm``, calibration and evaluation parts."""
    tokenizer = train_tokenizer(dataset, vocab_size, out / "tokenizer")
    everything = 2**62
    return tokenize_dataset(
        dataset,
        tokenizer,
        out,
        seq_len=seq_len,
        train_tokens=everything,
        calibration_tokens=everything,
        evaluation_tokens=everything,
        part="lm",
    )


def main() -> None:
    """Command line of this module."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Tokenizer and tokens for the bundled models.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dataset", default="python-stdlib", help="or python-packages")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256, help="context in tokens")
    args = parser.parse_args()
    dataset = DatasetConfig(path=args.dataset)
    splits = prepare(dataset, args.out, vocab_size=args.vocab_size, seq_len=args.seq_len)
    _log.info("%s", splits.info["splits"])


if __name__ == "__main__":
    main()
