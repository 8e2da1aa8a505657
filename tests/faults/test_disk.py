"""Full, read-only, forbidden and slow disks: one line, nothing corrupted, and on it goes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MADE_BY, STEPS, Run, assert_no_litter, assert_same
from tests.faults.harness import Outcome, mounted_tmpfs, run

NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    with mounted_tmpfs(directory, "24m") as mounted:
        if not mounted:
            pytest.skip("mounting a tmpfs is not permitted here")
        yield directory


def _on_disk(disk: Path, reference: Run, step: str) -> Run:
    result = Run(disk / "run", reference.config, disk.parent)
    shutil.copytree(reference.directory, result.directory)
    for later in STEPS[STEPS.index(step) :]:
        result.forget(later)
    return result


def _fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for ``leave`` bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return ballast


def _assert_one_line(outcome: Outcome, text: str) -> None:
    assert outcome.status == 1, outcome.errors
    assert "Traceback" not in outcome.errors
    said = [line for line in outcome.lines if line.startswith("spalf: ")]
    assert len(said) == 1 and text in said[0], outcome.errors


FULL = [("calibrate", leave) for leave in (0, 40_000, 200_000, 2_000_000)]
FULL += [("phase1", leave) for leave in (0, 100_000, 300_000, 500_000, 600_000)]
FULL += [("phase2", leave) for leave in (0, 300_000, 600_000)]
FULL += [("evaluate", leave) for leave in (0, 4096, 8192)]
FULL += [("init", leave) for leave in (0, 20_000)]
FULL += [("baseline", leave) for leave in (0, 100_000, 300_000)]


@pytest.mark.parametrize(("step", "leave"), FULL)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    step: str, leave: int, small_disk: Path, reference: Run
) -> None:
    result = _on_disk(small_disk, reference, step)
    ballast = _fill(small_disk, leave)
    outcome = result.run(step)
    _assert_one_line(outcome, "the disk is full")
    assert str(result.directory) in outcome.lines[-1]
    assert not list(result.directory.rglob("*.tmp"))
    ballast.unlink()
    again = result.run(step)
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY[step])


REPORTS = {
    "aggregate": "tables/frontier.csv",
    "tables": "tables/frontier.md",
    "figures": "figures/pareto.pdf",
}


@pytest.mark.parametrize("command", REPORTS)
def test_a_report_on_a_full_disk_is_one_line_and_the_last_one_stays(
    command: str, small_disk: Path, reference: Run
) -> None:
    frontier, log = small_disk / REPORTS["aggregate"], small_disk.parent / "errors"
    arguments = {
        "aggregate": ["--out", str(frontier.parent), str(reference.output("evaluate"))],
        "tables": ["--out", str(frontier.parent), str(frontier)],
        "figures": ["--out", str(small_disk / "figures"), "--frontier", str(frontier)],
    }
    for name in list(REPORTS)[: list(REPORTS).index(command) + 1]:
        assert run(["spalf", name, *arguments[name]], log).status == 0, log.read_text()
    made = small_disk / REPORTS[command]
    before = made.read_bytes()
    _fill(small_disk, 0)
    outcome = run(["spalf", command, *arguments[command]], log)
    _assert_one_line(outcome, "the disk is full")
    assert str(made) in outcome.lines[-1]
    assert made.read_bytes() == before
    assert not list(small_disk.rglob("*.tmp"))


def test_a_disk_that_fills_up_under_way_keeps_the_checkpoint_before(
    small_disk: Path, reference: Run
) -> None:
    result = _on_disk(small_disk, reference, "phase1")

    def install() -> None:
        from spalf.training import graph

        step = graph.train_step

        def filling(state: Any, *args: Any) -> Any:
            if state.step == 20:
                _fill(small_disk, 0)
            return step(state, *args)

        graph.train_step = filling

    outcome = result.run("phase1", install)
    _assert_one_line(outcome, "the disk is full")
    (small_disk / "ballast").unlink()
    again = result.run("phase1")
    assert again.status == 0 and "at step 16" in again.errors, again.errors
    assert_same(result, reference, MADE_BY["phase1"])


def test_a_read_only_disk_is_one_line(small_disk: Path, reference: Run) -> None:
    result = _on_disk(small_disk, reference, "phase1")
    log = small_disk.parent / "errors"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        outcome = run(result.arguments("phase1"), log)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    _assert_one_line(outcome, "Read-only file system")
    assert str(result.directory) in outcome.lines[-1]
    again = result.run("phase1")
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY["phase1"])


@pytest.mark.parametrize("closed", ["run", "run/phase1.checkpoints"])
def test_a_forbidden_directory_is_one_line(closed: str, reference: Run) -> None:
    if os.getuid() != 0:
        pytest.skip("another user is needed, and only root can become one")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        config = base / "run.yaml"
        shutil.copy(reference.config, config)
        text = config.read_text()
        corpus = next(line for line in text.splitlines() if line.startswith("dataset:"))
        assert corpus
        result = Run(base / "run", config)
        for earlier in ("calibrate", "init"):
            shutil.copytree(reference.output(earlier), result.output(earlier))
        result.working("phase1").mkdir(exist_ok=True)
        open_to = [p for p in (base / "run", result.working("phase1")) if p != base / closed]
        for path in open_to:
            os.chown(path, NOBODY, NOBODY)
        if closed == "run":
            result.working("phase1").rmdir()
        log = base / "errors"
        log.touch()
        log.chmod(0o666)
        outcome = run(result.arguments("phase1"), log, uid=NOBODY)
        _assert_one_line(outcome, "Permission denied")
        assert str(base / "run") in outcome.lines[-1]
        again = run(result.arguments("phase1"), log)
        assert again.status == 0, again.errors
        assert_same(result, reference, MADE_BY["phase1"])


def _slow_renames() -> None:
    for name in ("rename", "replace"):
        setattr(os, name, _slowly(getattr(os, name)))


def _slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        result = function(*args, **kwargs)
        time.sleep(0.05)
        return result

    return slow


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_slow_renames_change_nothing_even_when_killed_in_one(
    share: float, step: str, reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    """The renames are counted first, so that the kill is in the middle of one."""
    result, counter = fresh(step), tmp_path / "renames"
    assert result.run(step, lambda: _slow_renames(counter)).status == 0
    number = max(1, round(share * int(counter.read_text())))
    result.forget(step)
    killed = result.run(step, lambda: _slow_renames(counter, kill_in=number))
    assert killed.status == -signal.SIGKILL, killed.errors
    again = result.run(step, lambda: _slow_renames(counter))
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY[step])
    assert_no_litter(result)


def _slow_renames(counter: Path, kill_in: int | None = None) -> None:
    """A server that takes its time, and answers after it has done what it was asked."""
    renames = [0]

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            renames[0] += 1
            counter.write_text(str(renames[0]))
            time.sleep(0.03)
            function(*args, **kwargs)
            if renames[0] == kill_in:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.03)

        return slow

    for name in ("rename", "replace"):
        setattr(os, name, slowly(getattr(os, name)))
