"""Models and datasets of a hub, by the real clients: revisions, streaming, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spalf.models import load_model
from tests.helpers_hub import BRANCHES, GATED, Hub, running_hub
from tests.helpers_models import save_tiny_model

ROOT = Path(__file__).parents[2]
SITE = "blocks.1.hook_resid_post"
BACKENDS = ("huggingface", "transformer_lens")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A model with two revisions, and a dataset with two configurations of two splits."""
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        for seed, branch in enumerate(BRANCHES):
            save_tiny_model("gpt_neox", hub.repository("models", "org/tiny", branch), seed)
        texts = hub.repository("datasets", "org/texts")
        card = ["---", "configs:"]
        for language in ("en", "de"):
            (texts / language).mkdir()
            card += [f"- config_name: {language}", "  data_files:"]
            for split in ("train", "validation"):
                name = f"{language}/{split}.jsonl"
                card += [f"  - split: {split}", f"    path: {name}"]
                rows = [{"text": f"{language} {split} {i}", "ids": [i % 30]} for i in range(300)]
                (texts / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (texts / "README.md").write_text("\n".join([*card, "---\n"]))
        yield hub


def ask(hub: Hub, home: Path, code: str, **environment: str) -> Any:
    """What ``code`` puts into ``answer``, in a process of its own."""
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **environment}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint(json.dumps(answer))"],
        env={**kept, **given},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PRELUDE = """
import json, torch
from spalf.config import DatasetConfig
from spalf.data import documents
from spalf.errors import UserError
from spalf.models import load_model, load_tokenizer

def said(ask):
    try:
        return f"no fault: {ask()}"
    except UserError as error:
        return str(error)
"""

LOGITS = f"""
x = torch.arange(12)[None]
models = [load_model("org/tiny", "{SITE}", backend=b, revision=REVISION, device="cpu")
          for b in {BACKENDS}]
answer = [model.logits(x).sum(dim=(0, 1)).tolist() for model in models]
"""


def test_a_revision_is_what_both_backends_read_and_all_that_they_read(
    hub: Hub, tmp_path: Path
) -> None:
    hub.asked.clear()
    found = ask(hub, tmp_path, f"REVISION = 'v2'\n{LOGITS}")
    second = str(hub.root / "models" / "org/tiny" / BRANCHES["v2"])
    expected = load_model(second, SITE, device="cpu").logits(torch.arange(12)[None])
    for logits in found:
        torch.testing.assert_close(torch.tensor(logits), expected.sum(dim=(0, 1)))
    assert not [line for line in hub.asked if "main" in line or BRANCHES["main"] in line]
    # Later, with no hub in reach, the commit alone is enough.
    hub.asked.clear()
    commit = f"REVISION = '{BRANCHES['v2']}'\n{LOGITS}"
    assert ask(hub, tmp_path, commit, HF_HUB_OFFLINE="1") == found
    assert not hub.asked


def test_a_dataset_is_streamed_by_configuration_and_split(hub: Hub, tmp_path: Path) -> None:
    code = """
dataset = DatasetConfig(path="org/texts", name="de", split="validation")
tokens = DatasetConfig(path="org/texts", name="en", tokens_field="ids")
answer = [[d.text for d in documents(dataset)], [d.text for d in documents(dataset)],
          [int(d.ids[0]) for d in documents(tokens)]]
"""
    first, second, ids = ask(hub, tmp_path, code)
    assert first == second == [f"de validation {i}" for i in range(300)]
    assert ids == [i % 30 for i in range(300)]
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"de vali" in _start(path)]
    assert not kept  # nothing of it was copied into a cache


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def test_what_the_hub_refuses_is_one_line_with_what_to_do_without_it(
    hub: Hub, tmp_path: Path
) -> None:
    code = f"""
model = lambda name, **options: said(lambda: load_model(name, "{SITE}", device="cpu", **options))
data = lambda path, **options: said(lambda: next(documents(DatasetConfig(path=path, **options))))
answer = {{
    "no model": model("org/none"),
    "tokenizer": said(lambda: load_tokenizer("org/none")),
    "gated model": model("{GATED}"),
    "no revision": model("org/tiny", revision="v9"),
    "no dataset": data("org/none"),
    "gated dataset": data("{GATED}"),
    "no dataset revision": data("org/texts", name="en", revision="v9"),
    "which configuration": data("org/texts"),
    "no configuration": data("org/texts", name="fr"),
    "no split": data("org/texts", name="de", split="test"),
}}
"""
    answers = ask(hub, tmp_path, code)
    expected = {
        "no model": "the hub has nothing of that name; if it is private, `hf auth login`",
        "tokenizer": "its tokenizer cannot be fetched (the hub has nothing of that name",
        "gated model": "accept its terms on the hub, then `hf auth login`",
        "no revision": "the hub has no such revision",
        "no dataset": "doesn't exist on the Hub or cannot be accessed",
        "gated dataset": "is a gated dataset on the Hub",
        "no dataset revision": "the hub has no such revision",
        "which configuration": "available configs: ['en', 'de']",
        "no configuration": "Available: ['en', 'de']",
        "no split": "Available splits: ['train', 'validation']",
    }
    assert answers.keys() == expected.keys()
    for name, words in expected.items():
        said, model = answers[name], "model" in name or name in ("tokenizer", "no revision")
        assert words in said, (name, said)
        assert "\n" not in said
        alternative = "spalf/demo-2l" if model else "`python-stdlib` or the path of a local"
        assert "with no network, give" in said and alternative in said, (name, said)
        assert said.startswith("model_name = " if model else "dataset = ")
