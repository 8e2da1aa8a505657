"""A workflow run with a stand-in for the ``spalf`` command, so that only Snakemake is slow."""

from __future__ import annotations

import copy
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "models": {"tiny": {"model_name": "spalf/demo-2l", "hook_point": "blocks.0.hook_resid_post"}},
    "dataset": "python-stdlib",
    "grid": {"L0_target": [4, 8], "seed": [0]},
    "train": {"F": 256, "total_tokens": 65536, "batch_size": 512, "seq_len": 64},
    "runtime": {"device": "cpu"},
}


@dataclass
class Sweep:
    """A working directory with a configuration, and the Snakefile that is run in it."""

    directory: Path
    source: Path
    bin: Path

    def configure(self, **changes: Any) -> None:
        """Write the small configuration with ``section={"key": value}`` changed."""
        config = copy.deepcopy(SMALL)
        for section, values in changes.items():
            if isinstance(values, dict):
                config[section] = {**config.get(section, {}), **values}
            else:
                config[section] = values
        (self.directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run snakemake here; its two streams come back as one text."""
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(self.source / "Snakefile")]
        # Targets and --config follow a --configfile, which takes every plain argument after it.
        command += ["--configfile", "config.yaml", *arguments]
        return subprocess.run(
            command,
            cwd=self.directory,
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(self.bin), os.environ["PATH"]]),
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "STUB_CALLS": str(self.directory / "calls.tsv"),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs that a dry run would start, by rule, without ``all`` and ``total``."""
        result = self.run("--dry-run", "--quiet", "rules", *arguments)
        assert result.returncode == 0, result.stdout
        tables = result.stdout.split("Job stats:")
        if len(tables) == 1:
            assert "Nothing to be done" in result.stdout, result.stdout
            return {}
        rows = re.findall(r"^(\w+) +(\d+)$", tables[-1], flags=re.MULTILINE)
        return {rule: int(count) for rule, count in rows if rule not in ("all", "total")}

    def calls(self) -> list[list[str]]:
        """Every call of the stand-in so far: the step and its arguments."""
        path = self.directory / "calls.tsv"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [line.split("\t") for line in lines]


@pytest.fixture(scope="session")
def stub_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose ``spalf`` is the stand-in."""
    directory = tmp_path_factory.mktemp("bin")
    stub = Path(__file__).with_name("stub_spalf.py")
    script = directory / "spalf"
    script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{stub}' \"$@\"\n", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return directory


@pytest.fixture
def sweep(tmp_path: Path, stub_bin: Path) -> Sweep:
    """An empty working directory with the small configuration; its path has a space."""
    directory = tmp_path / "a sweep"
    directory.mkdir()
    result = Sweep(directory, ROOT, stub_bin)
    result.configure()
    return result


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory, stub_bin: Path) -> Sweep:
    """The small sweep, run to its end; tests take a copy."""
    directory = tmp_path_factory.mktemp("finished") / "a sweep"
    directory.mkdir()
    result = Sweep(directory, ROOT, stub_bin)
    result.configure()
    run = result.run("--quiet", "all")
    assert run.returncode == 0, run.stdout
    return result


@pytest.fixture
def finished(finished_once: Sweep, tmp_path: Path) -> Sweep:
    """A copy of the finished sweep, to be changed freely."""
    directory = tmp_path / "a sweep"
    shutil.copytree(finished_once.directory, directory, symlinks=True)
    return Sweep(directory, ROOT, finished_once.bin)


@pytest.fixture
def edited(finished: Sweep, tmp_path: Path) -> Sweep:
    """The finished sweep with a copy of the workflow's source, to be edited."""
    source = tmp_path / "a clone"
    source.mkdir()
    shutil.copy(ROOT / "Snakefile", source)
    shutil.copy(ROOT / "environment.yml", source)
    shutil.copytree(ROOT / "workflow", source / "workflow")
    (source / "profiles").symlink_to("workflow/profiles")
    return Sweep(finished.directory, source, finished.bin)
