from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalf.cli.data import data
from spalf.cli.errors import status_of
from spalf.config import RunConfig


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
    assert "sequence 0 of evaluation: [0, " in text
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
        ((tmp_path,), "no usable tokens"),
        ((tmp_path / "missing.yaml",), "no such file"),
        ((calibration, "--sample", 10**6), "sequences, counted from 0"),
        ((calibration, "--split", "test"), "must be one of train, calibration, evaluation"),
    ):
        status, text = inspect(*arguments)
        assert status == 2 and remedy in text and text.count("\n") == 1
