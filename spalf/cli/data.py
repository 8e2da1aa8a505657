"""``spalf data inspect``: documents and tokens, before and after they are packed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from spalf.cli.listing import Listing
from spalf.config import DatasetConfig
from spalf.errors import UserError


@click.group("data", cls=Listing, epilog="Example: spalf data inspect results/demo-2l/calibration")
def data() -> None:
    """Look at datasets and tokens."""


@data.command(
    "inspect",
    epilog="Example: spalf data inspect my-corpus.jsonl --model-name EleutherAI/pythia-160m",
)
@click.option(
    "--model-name", help="Model whose tokenizer to use; by default the one that SOURCE names."
)
@click.option(
    "--dataset",
    "keys",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of `dataset` in a configuration, such as text_field=content; may be repeated.",
)
@click.option(
    "--documents", type=click.IntRange(min=1), default=1000, help="How many to read of a dataset."
)
@click.option("--split", default="evaluation", help="Split that the sample is of.")
@click.option(
    "--sample", type=click.IntRange(min=0), default=0, help="Sequence or document of it to show."
)
@click.option("--cell", help="Of a sweep, as MODEL/L0_<target>/seed_<seed>.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.argument("source")
def inspect(
    source: str,
    model_name: str | None,
    keys: tuple[str, ...],
    documents: int,
    split: str,
    sample: int,
    cell: str | None,
    debug: bool,
) -> None:
    """Show documents, tokens and boundaries of each split, and a sample.

    SOURCE is a dataset (a file, a directory, a hub id, python-stdlib), the YAML file of a run or a
    sweep, of whose dataset the first documents are read, or a calibration directory, whose tokens
    are checked against their digests.
    """
    path = Path(source)
    if _holds_tokens(path):
        text = _tokens(path, sample, split, model_name)
    elif path.suffix in (".yaml", ".yml"):
        text = _configured(path, documents, sample, split, cell, model_name)
    else:
        text = _dataset(_given(source, keys, model_name), documents, sample, split)
    click.echo(text)


def _holds_tokens(path: Path) -> bool:
    """Whether a path is, or was meant to be, a calibration or its tokens."""
    return any((path / name).exists() for name in ("tokens.json", "tokens", "metadata.json"))


@dataclass(frozen=True)
class _Subject:
    """A dataset to look at.

    Attributes:
        dataset: where the text comes from.
        tokenizer: what makes tokens of it.
        seq_len: tokens of a document to show as the sample.
        facts: what else is known.
    """

    dataset: DatasetConfig
    tokenizer: Any
    seq_len: int = 128
    facts: tuple[tuple[str, str], ...] = ()


def _given(source: str, keys: tuple[str, ...], model_name: str | None) -> _Subject:
    """A dataset named on the command line."""
    from spalf.config import parse

    pairs = [key.partition("=") for key in keys]
    for name, equals, value in pairs:
        if not equals:
            remedy = "must be KEY=VALUE, such as text_field=content"
            raise UserError("--dataset", name + value, remedy)
    options = {name: value for name, _, value in pairs}
    dataset = parse(DatasetConfig, {**options, "path": source}, "--dataset")
    if model_name is None:
        remedy = (
            "is read as a dataset; say whose tokenizer to use, as in --model-name spalf/demo-2l "
            "(a configuration ends in .yaml, a calibration holds tokens/)"
        )
        raise UserError("source", source, remedy)
    return _Subject(dataset, _tokenizer(model_name))


def _configured(
    source: Path, limit: int, sample: int, split: str, cell: str | None, model_name: str | None
) -> str:
    """The dataset of a configuration."""
    from spalf.cli.describe import run_of

    config = run_of(source, cell)
    name = model_name or config.model_name
    tokenizer = _tokenizer(name, config.revision, config.trust_remote_code)
    wanted = f"{config.total_tokens:,} for training, in sequences of {config.seq_len}"
    subject = _Subject(config.dataset, tokenizer, config.seq_len, (("wanted", wanted),))
    return _dataset(subject, limit, sample, split)


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
    return _page(
        facts,
        summarise_tokens(splits, tokenizer.decode),
        f"sequence {sample} of {split} is: {_first(ids)}",
        tokenizer.decode(ids),
    )


def _dataset(subject: _Subject, limit: int, sample: int, split: str) -> str:
    from spalf.data.summary import read_documents, summarise_documents

    found = read_documents(subject.dataset, subject.tokenizer, limit)
    rows = summarise_documents(found, subject.tokenizer.decode)
    read, tokens = sum(row.documents for row in rows), sum(row.tokens for row in rows)
    facts = [
        ("dataset", _name_of(subject.dataset)),
        ("read", f"{read:,} documents{'' if read == limit else ', all there are'}"),
        ("tokens", f"{tokens:,}; {tokens / max(1, read):,.0f} per document"),
        *subject.facts,
    ]
    if "lm" in found:
        facts.append(("lm", "what the bundled language models were trained on; no run reads it"))
    if split not in found:
        raise UserError("--split", split, f"must be one of {', '.join(found)}")
    return _page(facts, rows, *_document(found[split], split, sample, subject))


def _document(
    found: list[list[int]], split: str, number: int, subject: _Subject
) -> tuple[str, str]:
    """What is said of one of the documents of a split, and its beginning as text."""
    if not found and number == 0:
        return f"none of the documents read is in {split}", ""
    if number >= len(found):
        remedy = f"{split} has {len(found)} of the documents read, counted from 0"
        raise UserError("--sample", number, remedy)
    ids = found[number]
    beginning = f"begins, of {len(ids):,} tokens" if len(ids) > subject.seq_len else "is"
    text = subject.tokenizer.decode(ids[: subject.seq_len])
    return f"document {number} of {split} {beginning}: {_first(ids)}", text


def _page(facts: list[tuple[str, str]], rows: list[Any], title: str, sample: str) -> str:
    return "\n\n".join([tabulate(facts, tablefmt="plain"), _table(rows), f"{title}\n{sample}"])


def _first(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', …' if len(ids) > 8 else ''}]"


def _table(rows: list[Any]) -> str:
    body = [
        {
            "split": row.name,
            "documents": f"{row.documents:,}",
            "sequences": None if row.sequences is None else f"{row.sequences:,}",
            "tokens": f"{row.tokens:,}",
            "share": f"{row.share:.1%}",
            "begins": _edge(repr(row.begins)),
            "ends": _edge(repr(row.ends)[::-1])[::-1],
        }
        for row in rows
    ]
    known = [name for name in body[0] if any(row[name] is not None for row in body)]
    align = ["left" if name in ("split", "begins", "ends") else "right" for name in known]
    cells = [[row[name] for name in known] for row in body]
    return tabulate(cells, headers=known, disable_numparse=True, colalign=align)


def _edge(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


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
