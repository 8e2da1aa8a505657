from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalf.cli.data import data
from spalf.cli.errors import status_of
from spalf.config import RunConfig
from spalf.models import load_tokenizer


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[int, str]:
        given = ["inspect", *map(str, arguments)]
        status = status_of(lambda: data.main(given, standalone_mode=False), debug=False)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_inspect_a_calibration(inspect: Any, demo_run: Path) -> None:
    from spalf.data import TokenSplits

    status, text = inspect(demo_run / "calibration")
    assert status == 0
    info = TokenSplits.open(demo_run / "calibration" / "tokens").info
    for name, entry in info["splits"].items():
        row = re.search(rf"^{name} .*$", text, re.MULTILINE)
        assert row is not None
        for number in ("documents", "sequences", "tokens"):
            assert f"{entry[number]:,}" in row[0].split()
    assert "demo-2l, 2,048 tokens" in text and "64 tokens each" in text
    assert "'<|endoftext|>" in text
    assert "sequence 0 of evaluation is: [0, " in text
    assert inspect(demo_run / "calibration" / "tokens", "--split", "train", "--sample", 1)[0] == 0


def test_inspect_a_dataset_before_a_run(inspect: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "document {i} of 300"}}\n' for i in range(300)))
    settings = {
        "model_name": "spalf/demo-2l",
        "hook_point": "blocks.1.hook_resid_post",
        "dataset": str(texts),
        "F": 96,
        "L0_target": 8.0,
        "total_tokens": 5120,
        "batch_size": 512,
        "seq_len": 64,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    status, text = inspect(tmp_path / "run.yaml")
    assert status == 0
    assert "300 documents, all there are" in text and "5,120 for training" in text
    counts = [int(n) for n in re.findall(r"^(?:train|cali\w+|eval\w+) +(\d+) ", text, re.MULTILINE)]
    assert sum(counts) == 300 and min(counts) > 3
    assert "'document " in text
    sample = re.search(r"document 0 of evaluation is: \[[\d, …]+\]\n(document \d+ of 300)\n", text)
    assert sample is not None
    assert "100 documents\n" in inspect(tmp_path / "run.yaml", "--documents", 100)[1]


def test_inspect_a_cell_of_a_sweep(inspect: Any, demo_config: RunConfig, tmp_path: Path) -> None:
    sweep = {
        "models": {
            "tiny": {"model_name": "spalf/demo-2l", "hook_point": "blocks.1.hook_resid_post"}
        },
        "dataset": "python-stdlib",
        "grid": {"L0_target": [4, 8]},
        "train": {"F": 96, "total_tokens": 5120, "batch_size": 512, "seq_len": 64},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    arguments = (tmp_path / "sweep.yaml", "--documents", 20)
    assert "python-stdlib" in inspect(*arguments)[1]
    status, text = inspect(*arguments, "--cell", "tiny/L0_5/seed_0")
    assert status == 2 and "is not in the sweep" in text


def test_what_cannot_be_inspected(inspect: Any, demo_run: Path, tmp_path: Path) -> None:
    calibration = demo_run / "calibration"
    for arguments, remedy in (
        ((tmp_path,), "is read as a dataset; say whose tokenizer to use"),
        ((tmp_path, "--model-name", "spalf/demo-2l"), "holds no text"),
        ((calibration.parent,), "is read as a dataset"),
        ((tmp_path / "missing.yaml",), "no such file"),
        ((calibration, "--sample", 10**6), "sequences, counted from 0"),
        ((calibration, "--split", "test"), "must be one of train, calibration, evaluation"),
    ):
        status, text = inspect(*arguments)
        assert status == 2 and remedy in text and text.count("\n") == 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 300 texts, or their tokens, in everything that can be read."""
    import numpy as np
    from datasets import Dataset, DatasetDict

    root = tmp_path_factory.mktemp("sources")
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(300)]
    ids = load_tokenizer("spalf/demo-2l")(texts, add_special_tokens=False)["input_ids"]
    rows = [{"text": t, "ids": i} for t, i in zip(texts, ids, strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "rows.jsonl").write_text(lines)
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = Dataset.from_list(rows)
    table.to_parquet(root / "rows.parquet")
    table.save_to_disk(root / "saved")
    DatasetDict({"other": table.select([0]), "train": table}).save_to_disk(root / "dictionary")
    shutil.copy(next((root / "saved").glob("*.arrow")), root / "rows.arrow")
    (root / "texts").mkdir()
    for i, text in enumerate(texts):
        (root / "texts" / f"{i:03d}.txt").write_text(text)
    np.save(root / "ids.npy", np.array([row[:8] for row in ids]))
    return root


@pytest.mark.parametrize(
    "name",
    [
        *("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.arrow", "saved", "dictionary"),
        *("texts", "ids.npy", "rows.jsonl ids"),
    ],
)
def test_every_kind_of_dataset_can_be_looked_at(inspect: Any, sources: Path, name: str) -> None:
    path, _, column = name.partition(" ")
    options = ("--dataset", f"tokens_field={column}") if column else ()
    status, text = inspect(sources / path, "--model-name", "spalf/demo-2l", *options)
    assert status == 0, text
    assert "300 documents, all there are" in text
    counts = [int(n) for n in re.findall(r"^(?:train|cali\w+|eval\w+) +(\d+) ", text, re.MULTILINE)]
    assert sum(counts) == 300 and min(counts) > 3
    assert len(re.findall(r" 'def f\d+\(", text)) >= 3  # where each split begins
    assert re.search(r"document 0 of evaluation is: \[\d+, .*\]\ndef f\d+\(", text)


def test_one_text_file_is_cut_into_documents(inspect: Any, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"paragraph {i}\n\n" for i in range(9000)))
    arguments = (tmp_path / "book.txt", "--model-name", "spalf/demo-2l")
    status, text = inspect(*arguments, "--documents", 400, "--sample", 1)
    assert status == 0 and "400 documents\n" in text
    assert re.search(r"document 1 of evaluation begins, of \d+ tokens", text)
    assert "none of the documents read is in evaluation" in inspect(*arguments, "--documents", 1)[1]


def test_faults_of_a_dataset_on_the_command_line(inspect: Any, sources: Path) -> None:
    rows, model = sources / "rows.jsonl", ("--model-name", "spalf/demo-2l")
    for arguments, words in (
        ((rows,), "say whose tokenizer to use, as in --model-name spalf/demo-2l"),
        ((rows, *model, "--dataset", "text"), "must be KEY=VALUE"),
        ((rows, *model, "--dataset", "textfield=text"), "did you mean 'text_field'?"),
        ((rows, *model, "--dataset", "text_field=words"), "the dataset has ids, text"),
        ((rows, *model, "--split", "test"), "must be one of train, calibration, evaluation"),
        ((rows, *model, "--sample", 10**6), "of the documents read, counted from 0"),
        ((sources / "none.jsonl", *model), "no such file or directory"),
        ((sources / "dictionary", *model, "--dataset", "split=test"), "it has other, train"),
    ):
        status, text = inspect(*arguments)
        assert status == 2 and words in text and text.count("\n") == 1, text


def test_token_ids_of_another_tokenizer_are_named(inspect: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [5, 50256]}\n' * 300)
    arguments = (tmp_path / "a.jsonl", "--dataset", "tokens_field=ids")
    status, text = inspect(*arguments, "--model-name", "spalf/demo-2l")
    assert status == 2 and "token ids from 5 to 50256 do not fit" in text
