from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spalf.bundled import train_lm
from spalf.models import load_model, load_tokenizer
from tests.helpers_models import tiny_tokenizer

SEQ_LEN = 24


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """What `spalf.bundled.prepare` writes, with a text that repeats with period 8."""
    data = tmp_path / "data"
    tiny_tokenizer().save_pretrained(data / "tokenizer")
    for name, count in (("train", 40), ("evaluation", 6)):
        start = np.arange(count)[:, None] + np.arange(SEQ_LEN)
        np.save(data / f"{name}.npy", (start % 8 + 3).astype(np.uint16))
    info = {
        "vocab_size": len(tiny_tokenizer()),
        "eos_token_id": 0,
        "seq_len": SEQ_LEN,
        "dataset": {"path": "python-stdlib"},
        "fingerprint": "f",
        "python_version": "3.11.0",
    }
    (data / "tokens.json").write_text(json.dumps(info))
    return data


def run(prepared: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    arguments = ["--data", str(prepared), "--out", str(out), "--device", "cpu", *options]
    monkeypatch.setattr("sys.argv", ["train_lm", *arguments])
    train_lm.main()
    return json.loads((out / "training.json").read_text())


def test_training_learns_and_writes_a_model_that_loads(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny-lm"
    sizes = ("--layers", "1", "--d-model", "16", "--heads", "2", "--batch-size", "8")
    record = run(prepared, out, monkeypatch, *sizes, "--epochs", "12", "--lr", "1e-2")
    assert record["steps"] == 60
    assert record["tokens_seen"] == 60 * 8 * SEQ_LEN
    assert record["held_out_loss"] < 0.5 * math.log(record["vocab_size"])
    card = (out / "README.md").read_text()
    assert f"{record['held_out_loss']:.4f} nats per token" in card
    assert record["command"] in card
    assert str(tmp_path) not in card + json.dumps(record)

    model = load_model(str(out), "blocks.0.hook_resid_post", device="cpu")
    assert len(load_tokenizer(str(out))) == model.d_vocab
    held_out = torch.from_numpy(np.load(prepared / "evaluation.npy").astype(np.int64))
    logits = model.logits(held_out)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, held_out[:, 1:].flatten())
    assert float(loss) == pytest.approx(record["held_out_loss"], abs=0.01)  # stored in float16


def test_training_is_a_function_of_its_seed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--layers", "1", "--d-model", "16", "--heads", "2", "--batch-size", "8")
    losses = [
        run(prepared, tmp_path / name, monkeypatch, *sizes, "--steps", "3", "--seed", seed)[
            "history"
        ]
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [train_lm._rate(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
