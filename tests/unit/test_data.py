from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spalf.config import DatasetConfig
from spalf.data import Document, TokenSplits, documents, split_of, tokenize_dataset
from spalf.data.splits import SHARES
from spalf.data.writers import SplitWriter
from spalf.errors import StopRequested, UserError
from tests.helpers_models import tiny_tokenizer

SPLITS = ("train", "calibration", "evaluation")
TEXTS = [f"document number {i} of many\n\nwith a second paragraph {i * i}" for i in range(400)]


def dataset(path: Path | str, **options: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **options)


def texts(path: Path | str, **options: Any) -> list[str]:
    return [document.text for document in documents(dataset(path, **options))]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenize(path: Path | str, out: Path, tokenizer: Any = None, **options: Any) -> TokenSplits:
    sizes = {"seq_len": 16, "train_tokens": 640, "calibration_tokens": 64, "evaluation_tokens": 64}
    tokenizer = tokenizer or tiny_tokenizer()
    return tokenize_dataset(dataset(path), tokenizer, out, **{**sizes, **options})


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "some data.jsonl", [{"text": text} for text in TEXTS])


def test_every_local_format_gives_the_same_texts(tmp_path: Path, jsonl: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": TEXTS, "other": list(range(len(TEXTS)))})
    rows.to_parquet(tmp_path / "data.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "dict")
    directory = tmp_path / "shards"
    directory.mkdir()
    for i in range(2):
        part = [{"text": text} for text in TEXTS[200 * i : 200 * (i + 1)]]
        write_jsonl(directory / f"{i}.jsonl", part)
    plain = tmp_path / "plain"
    (plain / "deeper").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (plain / "deeper" / f"{i:03}.txt").write_text(text)
    (plain / "picture.png").write_bytes(b"\xff\xfe")
    for path in (jsonl, tmp_path / "data.parquet", tmp_path / "saved", tmp_path / "dict"):
        assert texts(path) == TEXTS, path
    assert texts(directory) == TEXTS
    assert texts(plain) == TEXTS
    with pytest.raises(UserError, match="it has test, train"):
        texts(tmp_path / "dict", split="validation")


def test_other_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": t, "n": 1} for t in [*TEXTS, None, " "]])
    assert texts(path, text_field="body") == TEXTS
    with pytest.raises(UserError, match=r"^dataset.text_field = 'text'.*body, n"):
        texts(path)
    with pytest.raises(UserError, match="holds int, not text"):
        texts(path, text_field="n")


def test_one_long_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    whole = "\n\n".join(TEXTS)
    (tmp_path / "one.txt").write_text(whole)
    pieces = texts(tmp_path / "one.txt")
    assert "".join(pieces) == whole
    assert len(pieces) > 100
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    write_jsonl(tmp_path / "one.jsonl", [{"text": whole}])
    assert texts(tmp_path / "one.jsonl") == pieces


def test_very_long_file_is_read_in_blocks(tmp_path: Path) -> None:
    whole = ("x" * 99 + "\n") * 25_000
    (tmp_path / "long.txt").write_text(whole)
    pieces = texts(tmp_path / "long.txt")
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= 2 * 16_384


def test_duplicates_share_a_key_and_so_a_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*TEXTS, *TEXTS]])
    keys = [document.key for document in documents(dataset(path))]
    assert keys[:400] == keys[400:]
    assert len(set(keys)) == 400


def test_stdlib_documents() -> None:
    found = list(documents(dataset("python-stdlib")))
    keys = [document.key for document in found]
    assert len(keys) == len(set(keys)) > 500
    assert "argparse.py" in keys
    assert not any("site-packages" in key or key.startswith("/") for key in keys)
    assert keys == [document.key for document in documents(dataset("python-stdlib"))]
    # A prefix is a fair sample: it is not the first letters of the alphabet.
    assert len({key[0] for key in keys[:100]}) > 10
    sizes = dict.fromkeys(("lm", "train", "calibration", "evaluation"), 0)
    for document in found:
        sizes[split_of(document.key)] += len(document.text)
    shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    assert shares["lm"] == pytest.approx(0.5, abs=0.1)
    assert shares["train"] == pytest.approx(0.4, abs=0.1)
    assert 0.01 < shares["calibration"] < 0.12
    assert 0.01 < shares["evaluation"] < 0.12


def test_split_of_known_answers() -> None:
    """The bundled models were trained on the "lm" part: moving a file would leak."""
    known = {
        "argparse.py": "lm",
        "ast.py": "train",
        "json/decoder.py": "train",
        "os.py": "lm",
        "tarfile.py": "calibration",
        "textwrap.py": "evaluation",
    }
    assert {key: split_of(key) for key in known} == known


def test_m17_documents_are_whole_in_order_and_separated(jsonl: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos="<bos>", eos="<eos>")
    splits = tokenize(jsonl, tmp_path / "out", tokenizer, train_tokens=10**6)
    stream = splits.train.sequences(0, splits.train.n_sequences).flatten().tolist()
    wanted: list[int] = []
    for document in documents(dataset(jsonl)):
        if split_of(document.key, SHARES) == "train":
            ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
            wanted += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert stream == wanted[: len(stream)]
    assert len(wanted) - len(stream) < 16


def test_one_shared_special_token_stands_once_between_documents(
    jsonl: Path, tmp_path: Path
) -> None:
    splits = tokenize(jsonl, tmp_path / "out", train_tokens=10**6)
    stream = splits.train.sequences(0, splits.train.n_sequences).flatten()
    separators = (stream == 0).nonzero().flatten()
    assert separators[0] == 0
    assert int(separators.diff().min()) > 1
    # The last document may have begun after the last whole sequence.
    assert splits.info["splits"]["train"]["documents"] - len(separators) in (0, 1)


def test_m17_splits_share_no_document(jsonl: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    splits = tokenize(jsonl, tmp_path / "out", **{f"{name}_tokens": 10**6 for name in SPLITS})
    seen: list[set[str]] = []
    for name in SPLITS:
        stream = getattr(splits, name)
        text = tokenizer.decode(stream.sequences(0, stream.n_sequences).flatten().tolist())
        seen.append({part.split("with")[0] for part in text.split("<|endoftext|>")[1:-1]})
        assert len(seen[-1]) > 3
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


def test_sizes_are_what_was_asked_for(jsonl: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    splits = tokenize(jsonl, tmp_path / "out", progress=counts.append)
    shapes = [(getattr(splits, n).n_sequences, getattr(splits, n).seq_len) for n in SPLITS]
    assert shapes == [(40, 16), (4, 16), (4, 16)]
    assert sum(counts) >= 640 + 64 + 64
    smaller = tokenize(jsonl, tmp_path / "all", train_tokens=10**9)
    assert 40 < smaller.train.n_sequences < 10**4


def test_files_and_index(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    splits = tokenize(jsonl, out)
    names = {"tokens.json", *(f"{name}.npy" for name in SPLITS)}
    assert {path.name for path in out.iterdir()} == names
    for name in SPLITS:
        assert np.load(out / f"{name}.npy").dtype == np.uint16
        digest = hashlib.sha256((out / f"{name}.npy").read_bytes()).hexdigest()
        assert splits.info["splits"][name]["sha256"] == digest
    again = tokenize(jsonl, tmp_path / "again")
    assert again.info == splits.info
    write_jsonl(jsonl, [{"text": text + "!"} for text in TEXTS])
    assert tokenize(jsonl, tmp_path / "new").info["fingerprint"] != splits.info["fingerprint"]


def test_large_vocabulary_is_kept_in_32_bits(jsonl: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(2**16)])
    tokenize(jsonl, tmp_path / "out", tokenizer)
    assert np.load(tmp_path / "out" / "train.npy").dtype == np.int32


def test_package_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    texts = {
        "one/a.py": "a = 1\n",
        "one/b.py": "b = 2\n",
        "two/same.py": "a = 1\n",
        "two/c.txt": "no",
    }
    for name, text in {**texts, "two/empty.py": " \n"}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    (site / "two/odd.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("spalf.data.sources.sysconfig.get_path", lambda _: str(site))
    found = list(documents(dataset("python-packages")))
    assert sorted(document.text for document in found) == ["# caf\ufffd\n", "a = 1\n", "b = 2\n"]
    assert len({document.key for document in found}) == 3
    assert found == list(documents(dataset("python-packages")))


def test_lm_part_is_disjoint_from_the_rest(tmp_path: Path, monkeypatch: Any) -> None:
    stdlib = [Document(f"{i}.py", f"file {i}") for i in range(600)]
    monkeypatch.setattr("spalf.data.pack.documents", lambda _: iter(stdlib))
    everything = {f"{name}_tokens": 10**6 for name in SPLITS}
    lm = tokenize("python-stdlib", tmp_path / "lm", part="lm", seq_len=4, **everything)
    sae = tokenize("python-stdlib", tmp_path / "sae", seq_len=4, **everything)
    for splits, part in ((lm, "lm"), (sae, "train")):
        expected = sum(split_of(document.key) == part for document in stdlib)
        assert splits.info["splits"]["train"]["documents"] == expected > 200
    assert lm.info["splits"]["evaluation"] == sae.info["splits"]["evaluation"]


def test_failures_leave_nothing_half_written(tmp_path: Path, jsonl: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "a few words"}])
    with pytest.raises(UserError, match=r"^dataset = .*too small: its (train|calibration)"):
        tokenize(short, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(jsonl, tmp_path / "out", progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match="no usable tokens"):
        TokenSplits.open(tmp_path / "out")


class Crash(Exception):
    """As good as a SIGKILL: nobody handles it."""


def small_batches(monkeypatch: Any) -> None:
    monkeypatch.setattr("spalf.data.pack._BATCH_TEXTS", 16)


def stopping_after(batches: int, error: type[Exception]) -> Callable[[int], None]:
    """A progress callback that raises once so many batches were tokenised."""
    seen = [0]

    def progress(tokens: int) -> None:
        seen[0] += tokens > 0
        if seen[0] == batches and tokens:
            raise error

    return progress


class Counting:
    """A tokenizer that keeps what it was given."""

    def __init__(self) -> None:
        self.wrapped, self.texts = tiny_tokenizer(), list[str]()

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return self.wrapped(texts, **options)

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


EVERYTHING = {f"{name}_tokens": 10**6 for name in SPLITS}


@pytest.mark.parametrize("wanted", [EVERYTHING, {}])
@pytest.mark.parametrize("batches", [1, 2, 7, 15])
def test_i10_tokenising_stopped_and_continued_is_bit_identical(
    jsonl: Path, tmp_path: Path, monkeypatch: Any, batches: int, wanted: dict[str, int]
) -> None:
    small_batches(monkeypatch)
    whole, stopped = Counting(), Counting()
    tokenize(jsonl, tmp_path / "whole", whole, **wanted)
    resumable = {"save_due": lambda _: False, **wanted}
    stop = stopping_after(batches, StopRequested)
    try:
        tokenize(jsonl, tmp_path / "out", stopped, progress=stop, **resumable)
    except StopRequested:
        tokenize(jsonl, tmp_path / "out", stopped, **resumable)
    else:
        assert len(whole.texts) < 16 * batches  # all splits were full before that
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert stopped.texts == whole.texts  # each of them once


def test_i10_tokenising_killed_goes_on_from_the_last_position_saved(
    jsonl: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    small_batches(monkeypatch)
    whole, killed = Counting(), Counting()
    tokenize(jsonl, tmp_path / "whole", whole, **EVERYTHING)
    resumable = {"save_due": lambda batch: batch % 3 == 0, **EVERYTHING}
    with pytest.raises(Crash):
        tokenize(jsonl, tmp_path / "out", killed, progress=stopping_after(8, Crash), **resumable)
    before = len(killed.texts)
    assert before == 8 * 16
    tokenize(jsonl, tmp_path / "out", killed, **resumable)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert killed.texts[before:] == whole.texts[6 * 16 :]


@pytest.mark.parametrize("split", SPLITS)
def test_tokenising_killed_between_two_published_files_loses_nothing(
    jsonl: Path, tmp_path: Path, monkeypatch: Any, split: str
) -> None:
    tokenize(jsonl, tmp_path / "whole", **EVERYTHING)
    tokenizer = Counting()
    publish = SplitWriter.publish

    def killed(writer: SplitWriter) -> Any:
        if writer._path.stem == split:
            raise Crash
        return publish(writer)

    resumable = {"save_due": lambda _: False, **EVERYTHING}
    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "publish", killed)
        with pytest.raises(Crash):
            tokenize(jsonl, tmp_path / "out", tokenizer, **resumable)
    before = len(tokenizer.texts)
    tokenize(jsonl, tmp_path / "out", tokenizer, **resumable)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(tokenizer.texts) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[150] ^= 1  # behind the header of an array, and within the first batch
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda out: flip(sorted(out.glob(".position_*"))[-1]), 6),
        (lambda out: sorted(out.glob(".position_*"))[-1].write_bytes(b""), 6),
        (lambda out: [flip(path) for path in out.glob(".position_*")], 0),
        (lambda out: flip(out / ".train.npy.partial"), 0),
        (lambda out: (out / ".evaluation.npy.partial").unlink(), 0),
        (lambda out: os.truncate(out / ".train.npy.partial", 200), 0),
        (lambda out: os.truncate(out / ".train.npy.partial", shortened(out)), 6),
    ],
)
def test_damaged_positions_and_partial_files_are_found(
    jsonl: Path, tmp_path: Path, monkeypatch: Any, caplog: Any, damage: Any, left: int
) -> None:
    """The position before is used, or tokenising starts anew; after 9 batches and after 6."""
    small_batches(monkeypatch)
    tokenizer, out = Counting(), tmp_path / "out"
    tokenize(jsonl, tmp_path / "whole", **EVERYTHING)
    resumable = {"save_due": lambda batch: batch % 3 == 0, **EVERYTHING}
    with pytest.raises(Crash):
        tokenize(jsonl, out, tokenizer, progress=stopping_after(10, Crash), **resumable)
    assert len(list(out.glob(".position_*"))) == 2
    damage(out)
    before = len(tokenizer.texts)
    tokenize(jsonl, out, tokenizer, **resumable)
    assert contents(out) == contents(tmp_path / "whole")
    read = sum(split_of(d.key, SHARES) in SPLITS for d in documents(dataset(jsonl)))
    assert len(tokenizer.texts) - before == read - left * 16
    assert "does not match its digest" in caplog.text or "is missing" in caplog.text


def shortened(out: Path) -> int:
    """A size between those of the last two positions."""
    tokens = []
    for path in sorted(out.glob(".position_*")):
        tokens.append(json.loads(path.read_text().split("\n")[1])["splits"]["train"]["tokens"])
    assert tokens[0] < tokens[1]
    return 128 + 2 * tokens[1] - 2


@pytest.mark.parametrize("change", ["altered", "shortened"])
def test_tokens_of_a_dataset_that_changed_meanwhile_are_not_mixed(
    jsonl: Path, tmp_path: Path, monkeypatch: Any, caplog: Any, change: str
) -> None:
    small_batches(monkeypatch)
    resumable = {"save_due": lambda _: True, **EVERYTHING}
    with pytest.raises(Crash):
        tokenize(jsonl, tmp_path / "out", progress=stopping_after(20, Crash), **resumable)
    other = [text.replace("document", "paper") for text in TEXTS]
    rows = other if change == "altered" else TEXTS[:300]
    write_jsonl(jsonl, [{"text": text} for text in rows])
    tokenize(jsonl, tmp_path / "out", **resumable)
    tokenize(jsonl, tmp_path / "whole", **EVERYTHING)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "the dataset has" in caplog.text


def test_bad_input_leaves_no_position_behind(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "a few words"}])
    with pytest.raises(UserError, match="too small"):
        tokenize(short, tmp_path / "out", save_due=lambda _: True)
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_huge_document_is_tokenised_in_pieces_and_stays_one(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("spalf.data.pack._HUGE_CHARACTERS", 2000)
    huge = "\n\n".join(f"paragraph {i} of the one huge document" for i in range(400))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": huge}, *({"text": t} for t in TEXTS)])
    tokenizer = Counting()
    splits = tokenize(path, tmp_path / "out", tokenizer, **EVERYTHING)
    assert max(map(len, tokenizer.texts)) <= 2000
    assert "".join(tokenizer.texts[: tokenizer.texts.index(TEXTS[0])]) == huge
    part = split_of(next(documents(dataset(path))).key, SHARES)
    stream = getattr(splits, part)
    text = tokenizer.decode(stream.sequences(0, stream.n_sequences).flatten().tolist())
    known = huge.replace("\n\n", "<unk>")  # the tiny tokenizer has no line ends
    assert text.startswith(f"<|endoftext|>{known}<|endoftext|>")


def test_index_that_does_not_match_its_files(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(jsonl, out)
    np.save(out / "train.npy", np.zeros((3, 16), np.uint16))
    with pytest.raises(UserError, match=r"^tokens = .*shape \(3, 16\).*calibrate"):
        TokenSplits.open(out)


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("missing.txt", None, "no such file"),
        ("missing.jsonl", None, "no such file"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("binary.txt", b"\x80\xff", "not UTF-8"),
        ("broken.jsonl", b"{not json", "cannot be read"),
        ("broken.parquet", b"PAR2", "cannot be read"),
        ("empty.jsonl", b"", "holds no text|cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, remedy: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=remedy) as raised:
        texts(tmp_path / name)
    assert raised.value.key == "dataset"
    assert "\n" not in str(raised.value)


def test_bad_directories(tmp_path: Path, jsonl: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no text"):
        texts(empty)
    (tmp_path / "b.parquet").touch()
    with pytest.raises(UserError, match="mixes json and parquet files"):
        texts(tmp_path)


def test_unreachable_hub_names_the_offline_alternative(monkeypatch: Any) -> None:
    monkeypatch.setattr("spalf.data.sources.hub_reachable", lambda: False)
    with pytest.raises(UserError, match=r"^dataset = 'org/name': .*python-stdlib.*local"):
        documents(dataset("org/name"))


def test_hub_failure_is_one_line(monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("spalf.data.sources.hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"cannot be fetched \(no route to host\); with no network"):
        documents(dataset("org/name"))


def test_text_needs_no_datasets_library() -> None:
    code = (
        "import sys; from spalf.config import DatasetConfig; from spalf.data import documents\n"
        "next(documents(DatasetConfig(path='python-stdlib')))\n"
        "assert not {'datasets', 'pyarrow', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tokens_outlive_the_stream(jsonl: Path, tmp_path: Path) -> None:
    splits = tokenize(jsonl, tmp_path / "out")
    batch = splits.train.sequences(0, 2, seed=1)
    assert batch.dtype == torch.int64
    batch += 1  # a copy: the file is not written to
    assert torch.equal(splits.train.sequences(0, 2, seed=1) + 1, batch)
