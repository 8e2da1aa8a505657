from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


def save_yaml(example: Example) -> None:
    Path("tutorial.yaml").write_text(example.parsed, encoding="utf-8")


def run_shell(example: Example) -> None:
    """Run a block's commands with the interpreter of the tests, installed or not."""
    commands = {
        "spalf": "from spalf.cli.main import main",
        "spalf-train": "from spalf.cli.run import train as main",
    }
    for line in example.parsed.strip().splitlines():
        name, *arguments = shlex.split(line)
        code = f"import sys; sys.argv[0] = {name!r}; {commands[name]}; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr


def parse() -> Document:
    parsers = [
        PythonCodeBlockParser(),
        CodeBlockParser("yaml", save_yaml),
        CodeBlockParser("sh", run_shell),
    ]
    return Sybil(parsers).parse(PAGE)


def test_every_block_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in parse().examples():
        example.evaluate()
    printed = capsys.readouterr().out
    assert "features per token explain" in printed
    assert "nats per token" in printed
    assert (tmp_path / "tutorial" / "saelens" / "README.md").is_file()


def test_no_block_of_the_tutorial_is_passed_over() -> None:
    fences = sum(line.startswith("```") for line in PAGE.read_text("utf-8").splitlines())
    hidden = PAGE.read_text("utf-8").count("<!--- invisible-code-block: python")
    assert len(list(parse().examples())) == fences // 2 + hidden
