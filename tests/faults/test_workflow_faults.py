"""Snakemake and its jobs killed at random moments: in the end the same table, byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.conftest import small_config

ROOT = Path(__file__).parents[2]
TABLE = Path("results/tables/frontier.csv")
KILLS = int(os.environ.get("SPALF_FAULT_WORKFLOW_KILLS", "4"))


def _grid(corpus: Path) -> dict[str, Any]:
    run = small_config(corpus)
    train = {k: run[k] for k in ("F", "R2_target", "lr", "total_tokens", "batch_size", "seq_len")}
    models = {"tiny": {k: run[k] for k in ("model_name", "hook_point")}}
    kept = {k: run[k] for k in ("dataset", "method", "constants", "evaluate", "runtime")}
    return {"models": models, "grid": {"L0_target": [6, 12], "seed": [0]}, "train": train, **kept}


def _command(*arguments: str) -> list[str]:
    start = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    return [*start, "--configfile", "config.yaml", "--cores", "2", "--quiet", "all", *arguments]


def _environment() -> dict[str, str]:
    tools = Path(sys.executable).parent
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GIT_DIR": "/nonexistent"}


@contextmanager
def _running(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Snakemake and its jobs as a process group of their own; none of them is left behind."""
    process = subprocess.Popen(
        _command(),
        cwd=directory,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def _to_the_end(directory: Path) -> str:
    """Run, unlocking where a crash left a lock, until all is done; what was said at the end."""
    said = ""
    for _ in range(4):
        with _running(directory) as process:
            said, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            return said
        _unlock(directory)
    raise AssertionError(said)


def _unlock(directory: Path) -> None:
    subprocess.run(
        _command("--unlock"), cwd=directory, env=_environment(), capture_output=True, check=False
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, float]:
    directory = tmp_path_factory.mktemp("undisturbed")
    (directory / "config.yaml").write_text(yaml.safe_dump(_grid(corpus)), encoding="utf-8")
    started = time.monotonic()
    _to_the_end(directory)
    return directory, time.monotonic() - started


@pytest.mark.timeout(300 * max(4, KILLS))
def test_killed_at_random_and_restarted_the_table_is_the_same(
    undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Over and over: a sweep that got to its end is compared, and another one begins."""
    reference, seconds = undisturbed
    choose = random.Random("workflow")
    shutil.copy(reference / "config.yaml", tmp_path)
    killed = 0
    while killed < KILLS:
        with _running(tmp_path) as process:
            try:
                said, _ = process.communicate(timeout=choose.uniform(3, 0.6 * seconds))
            except subprocess.TimeoutExpired:
                killed += 1
                _kill(process, choose.choice(("all", "snakemake", "term", "int")))
            else:
                assert process.returncode == 0, said
                _assert_same(tmp_path, reference)
                for name in ("results", ".snakemake"):
                    shutil.rmtree(tmp_path / name)
                continue
        _unlock(tmp_path)
    _to_the_end(tmp_path)
    _assert_same(tmp_path, reference)


def _assert_same(directory: Path, reference: Path) -> None:
    reports = sorted(reference.glob("results/tiny/L0_*/seed_0/evaluation.json"))
    assert len(reports) == 2
    for path in (reference / TABLE, *reports):
        there = path.relative_to(reference)
        assert (directory / there).read_bytes() == path.read_bytes(), there


def _kill(process: subprocess.Popen[str], how: str) -> None:
    """Kill everything at once; or Snakemake alone, and its orphans a moment later; or ask."""
    if how == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "snakemake":
        process.kill()
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGTERM if how == "term" else signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_a_directory_left_locked_by_a_crash_is_explained(
    undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    shutil.copy(undisturbed[0] / "config.yaml", tmp_path)
    with _running(tmp_path) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("results/tiny/calibration.checkpoints/*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again = subprocess.run(
        _command(), cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert "--unlock" in again.stdout + again.stderr
