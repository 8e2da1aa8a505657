"""``spalf data inspect``: tokens and documents, before or after they are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from spalf.config import DatasetConfig
from spalf.errors import UserError


@click.group("data", epilog="Example: spalf data inspect results/demo-2l/calibration")
def data() -> None:
    """Look at datasets and tokens."""


@data.command("inspect", epilog="Example: spalf data inspect results/demo-2l/calibration")
@click.option("--documents", type=click.IntRange(min=1), default=1000, help="To read of a dataset.")
@click.option("--sample", type=click.IntRange(min=0), default=0, help="Sequence to show.")
@click.option("--split", default="evaluation", help="Split that the sequence is of.")
@click.option("--cell", help="Of a sweep, as MODEL/L0_<target>/seed_<seed>.")
@click.option("--model-name", help="Model whose tokenizer to use; default: what SOURCE says.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.argument("source", type=click.Path(path_type=Path))
def inspect(
    source: Path,
    documents: int,
    sample: int,
    split: str,
    cell: str | None,
    model_name: str | None,
    debug: bool,
) -> None:
    """Say how many tokens and documents each split has, where it begins and ends, and a sample.

    SOURCE is a calibration directory (or its tokens), whose files are checked against their
    digests, or the YAML file of a run or a sweep, of whose dataset the first documents are read.
    """
    if source.is_dir():
        text = _tokens(source, sample, split, model_name)
    else:
        text = _dataset(source, documents, cell, model_name)
    click.echo(text)


def _tokens(source: Path, sample: int, split: str, model_name: str | None) -> str:
    from spalf.data import TokenSplits
    from spalf.data.summary import summarise_tokens

    directory = source if (source / "tokens.json").is_file() else source / "tokens"
    splits = TokenSplits.open(directory)
    tokenizer = _tokenizer(model_name or _model_of(directory.parent))
    info = splits.info
    if split not in info["splits"]:
        raise UserError("--split", split, f"must be one of {', '.join(info['splits'])}")
    stream = getattr(splits, split)
    if sample >= stream.n_sequences:
        remedy = f"{split} has {stream.n_sequences} sequences, counted from 0"
        raise UserError("--sample", sample, remedy)
    facts = [
        ("dataset", _name_of(DatasetConfig.model_validate(info["dataset"]))),
        ("tokenizer", f"{info['tokenizer']}, {info['vocab_size']:,} tokens"),
        ("BOS, EOS", f"{info['bos_token_id']}, {info['eos_token_id']}"),
        ("sequences", f"{info['seq_len']} tokens each, of packed documents"),
        ("splits", "by document: no document is in two; files match their digests"),
    ]
    ids = stream.sequences(sample, 1)[0].tolist()
    shown = tokenizer.decode(ids)
    return "\n\n".join(
        [
            tabulate(facts, tablefmt="plain"),
            _table(summarise_tokens(splits, tokenizer.decode)),
            f"sequence {sample} of {split}: {ids[:8]} …\n{shown}",
        ]
    )


def _dataset(source: Path, limit: int, cell: str | None, model_name: str | None) -> str:
    from spalf.cli.describe import run_of
    from spalf.data.summary import summarise_dataset

    config = run_of(source, cell)
    tokenizer = _tokenizer(
        model_name or config.model_name, config.revision, config.trust_remote_code
    )
    rows = summarise_dataset(config.dataset, tokenizer, limit)
    read, tokens = sum(row.documents for row in rows), sum(row.tokens for row in rows)
    facts = [
        ("dataset", _name_of(config.dataset)),
        ("read", f"{read:,} documents{'' if read == limit else ', all there are'}"),
        ("tokens", f"{tokens:,}; {tokens / max(1, read):,.0f} per document"),
        ("wanted", f"{config.total_tokens:,} for training, in sequences of {config.seq_len}"),
    ]
    return f"{tabulate(facts, tablefmt='plain')}\n\n{_table(rows)}"


def _table(rows: list[Any]) -> str:
    body = [
        (
            row.name,
            f"{row.documents:,}",
            f"{row.sequences:,}" if row.sequences else "–",
            f"{row.tokens:,}",
            f"{row.share:.1%}",
            repr(row.begins)[:40],
            repr(row.ends)[-40:],
        )
        for row in rows
    ]
    headers = ("split", "documents", "sequences", "tokens", "share", "begins", "ends")
    align = ("left", "right", "right", "right", "right", "left", "left")
    return tabulate(body, headers=headers, disable_numparse=True, colalign=align)


def _name_of(dataset: DatasetConfig) -> str:
    from spalf.data import is_on_hub

    details = {}
    if is_on_hub(dataset):
        details = {"configuration": dataset.name, "split": dataset.split}
        details["revision"] = dataset.revision
    return ", ".join([dataset.path, *(f"{k} {v}" for k, v in details.items() if v)])


def _tokenizer(model_name: str, revision: str | None = None, trust: bool = False) -> Any:
    from spalf.models import load_tokenizer

    return load_tokenizer(model_name, revision=revision, trust_remote_code=trust)


def _model_of(calibration: Path) -> str:
    path = calibration / "metadata.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model"]["model_name"])
    except (OSError, ValueError, KeyError, TypeError):
        remedy = "is not in a calibration directory; say whose tokenizer it is with --model-name"
        raise UserError("source", str(calibration), remedy) from None
