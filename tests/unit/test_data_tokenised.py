"""Datasets that are tokenised already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spalf.config import DatasetConfig
from spalf.data import TokenSplits, documents, split_of, tokenize_dataset
from spalf.data.splits import SHARES
from spalf.errors import StopRequested, UserError
from tests.helpers_models import tiny_tokenizer

SPLITS = ("train", "calibration", "evaluation")
SEQ_LEN = 16
ROWS = np.random.default_rng(0).integers(1, 39, (600, SEQ_LEN), dtype=np.uint16)


def tokenize(dataset: DatasetConfig, out: Path, **options: Any) -> TokenSplits:
    everything = {f"{name}_tokens": 10**6 for name in SPLITS}
    sizes = {"seq_len": SEQ_LEN, **everything, **options}
    return tokenize_dataset(dataset, tiny_tokenizer(), out, **sizes)


def contents(splits: TokenSplits) -> dict[str, np.ndarray]:
    streams = {name: getattr(splits, name) for name in SPLITS}
    return {name: s.sequences(0, s.n_sequences).numpy() for name, s in streams.items()}


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", ROWS)
    return tmp_path / "tokens.npy"


def test_rows_of_an_array_stay_whole_and_as_they_are(array: Path, tmp_path: Path) -> None:
    found = contents(tokenize(DatasetConfig(path=str(array)), tmp_path / "out"))
    keys = [d.key for d in documents(DatasetConfig(path=str(array)))]
    for name in SPLITS:
        expected = [
            row for row, key in zip(ROWS, keys, strict=True) if split_of(key, SHARES) == name
        ]
        assert len(expected) > 5
        assert np.array_equal(found[name], expected)


def test_every_kind_of_source_gives_the_same_sequences(array: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"input_ids": ROWS.tolist(), "text": ["unused"] * len(ROWS)})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "dict")
    lines = [json.dumps({"input_ids": row}) + "\n" for row in ROWS.tolist()]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(3):
        np.save(shards / f"{i}.npy", ROWS[200 * i : 200 * (i + 1)].astype(np.int32))
    expected = contents(tokenize(DatasetConfig(path=str(array)), tmp_path / "expected"))
    for name in ("rows.parquet", "saved", "dict", "rows.jsonl", "shards"):
        field = None if name == "shards" else "input_ids"
        dataset = DatasetConfig(path=str(tmp_path / name), tokens_field=field)
        found = contents(tokenize(dataset, tmp_path / f"out {name}"))
        for split in SPLITS:
            assert np.array_equal(found[split], expected[split]), name


def test_one_long_array_is_cut_into_pieces(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", ROWS.reshape(-1))
    dataset = DatasetConfig(path=str(tmp_path / "long.npy"))
    pieces = [document.ids for document in documents(dataset) if document.ids is not None]
    assert np.array_equal(np.concatenate(pieces), ROWS.reshape(-1))
    assert {len(piece) for piece in pieces} == {128}
    found = contents(tokenize(dataset, tmp_path / "out"))
    assert all(len(found[name]) > 0 for name in SPLITS)
    assert sum(map(len, found.values())) == len(ROWS)


def test_ids_keep_their_special_tokens_and_get_no_others(tmp_path: Path) -> None:
    rows = np.concatenate([np.zeros((300, 1), np.int64), np.full((300, 7), 5)], axis=1)
    rows[:, 1], rows[:, 2] = np.arange(300) % 30 + 3, np.arange(300) // 30 + 3
    np.save(tmp_path / "a.npy", rows)
    dataset = DatasetConfig(path=str(tmp_path / "a.npy"))
    found = contents(tokenize(dataset, tmp_path / "out", seq_len=8))
    assert all((sequences[:, 0] == 0).all() for sequences in found.values())


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_i10_stopped_and_continued_is_bit_identical(
    array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    monkeypatch.setattr("spalf.data.pack._BATCH_TEXTS", 50)
    dataset = DatasetConfig(path=str(array))
    tokenize(dataset, tmp_path / "whole")
    seen = [0]

    def stop(tokens: int) -> None:
        seen[0] += tokens > 0
        if tokens and seen[0] == batches:
            raise StopRequested

    with pytest.raises(StopRequested):
        tokenize(dataset, tmp_path / "out", progress=stop, save_due=lambda _: False)
    tokenize(dataset, tmp_path / "out", save_due=lambda _: False)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_change_of_the_array_is_noticed(array: Path, tmp_path: Path) -> None:
    dataset = DatasetConfig(path=str(array))
    first = tokenize(dataset, tmp_path / "first").info["fingerprint"]
    assert tokenize(dataset, tmp_path / "again").info["fingerprint"] == first
    changed = ROWS.copy()
    changed[0, 0] += 1
    np.save(array, changed)
    assert tokenize(dataset, tmp_path / "changed").info["fingerprint"] != first


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS.astype(np.int64) + 30)
    with pytest.raises(UserError, match=r"token ids from \d+ to 6\d do not fit .* tokenizer of 40"):
        tokenize(DatasetConfig(path=str(tmp_path / "a.npy")), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (np.zeros((4, 4)), "holds float64 of shape"),
        (np.zeros((2, 2, 2), np.int64), r"of shape \(2, 2, 2\)"),
        (np.array([{"a": 1}], dtype=object), "cannot be read: .*objects"),
    ],
)
def test_arrays_that_hold_no_token_ids(tmp_path: Path, content: Any, remedy: str) -> None:
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(UserError, match=remedy) as raised:
        list(documents(DatasetConfig(path=str(tmp_path / "a.npy"))))
    assert "\n" not in str(raised.value)


def test_bad_sources_are_one_line(tmp_path: Path) -> None:
    def fails(path: str, field: str | None) -> str:
        with pytest.raises(UserError) as raised:
            list(documents(DatasetConfig(path=str(tmp_path / path), tokens_field=field)))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    (tmp_path / "broken.npy").write_bytes(b"not an array")
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "a", "ids": [1, 2], "nested": [[1], [2, 3]], "n": 5}\n'
    )
    assert "cannot be read" in fails("broken.npy", None)
    assert "no such file" in fails("missing.npy", None)
    assert "plain text has no columns" in fails("a.txt", "ids")
    assert "dataset.tokens_field = 'input_ids': no such column" in fails("rows.jsonl", "input_ids")
    assert "holds str, not lists of token ids" in fails("rows.jsonl", "text")
    assert "holds list, not lists of token ids" in fails("rows.jsonl", "nested")
    assert "holds int, not lists of token ids" in fails("rows.jsonl", "n")


def test_a_hub_dataset_is_streamed_with_its_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, options))
        return [{"text": f"row {i}", "ids": [i % 30]} for i in range(300)]

    monkeypatch.setattr("spalf.data.sources.hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = {"name": "en", "split": "validation", "revision": "v1"}
    dataset = DatasetConfig(path="org/name", **options)
    assert [d.text for d in documents(dataset)] == [f"row {i}" for i in range(300)]
    assert asked == [("org/name", {"streaming": True, **options})]
    tokenised = dataset.model_copy(update={"tokens_field": "ids"})
    assert [int(d.ids[0]) for d in documents(tokenised) if d.ids is not None][:3] == [0, 1, 2]
