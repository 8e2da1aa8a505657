"""The grid of a sweep as a table, from the files that its steps leave."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from spalf.cli.progress import _Lines
from spalf.cli.status import status
from spalf.report.grid import describe_status
from spalf.report.status import describe_stopped, sweep_status
from tests.workflow.conftest import SMALL
from tests.workflow.synthetic import write_evaluation

PLACE = "job - on here\n"
RUNNING = (
    "12:00:05 INFO phase 1: 120/1940 [00:30<07:35, 4.00it/s] L0=15.2 R2=0.742 λ_faith=3.9\n"
    "12:00:10 INFO phase 1: 140/1940 [00:35<07:30, 4.00it/s] L0=14.8 R2=0.751 λ_faith=3.8\n"
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One model: a cell that is done, one that runs, one that stopped, one between two steps."""
    series = tmp_path / "results" / "tiny"
    write(series / "calibration" / "metadata.json", "{}")
    write(series / "calibration" / "logs" / "calibrate.log", PLACE)
    for target in (4, 8, 16, 32):
        write(series / f"L0_{target}" / "seed_0" / "init" / "metadata.json", "{}")
        write(series / f"L0_{target}" / "seed_0" / "logs" / "init.log", PLACE)
    done, runs, stopped, between = (series / f"L0_{n}" / "seed_0" for n in (4, 8, 16, 32))
    for cell in (done, between):
        write(cell / "phase1" / "metadata.json", "{}")
    write(between / "logs" / "phase1.log", PLACE + RUNNING)
    write(done / "phase2" / "metadata.json", "{}")
    write(done / "logs" / "evaluate.log", PLACE)
    write_evaluation(done / "evaluation.json", "tiny", 4.0)
    write(runs / "logs" / "phase1.log", PLACE + RUNNING)
    hold(runs / "phase1.checkpoints", os.getpid())
    write(stopped / "logs" / "phase1.log", PLACE + RUNNING + "spalf: x: the disk is full\n")
    return tmp_path / "results"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def hold(working: Path, pid: int, host: str | None = None) -> None:
    write(working / "holder.json", json.dumps({"pid": pid, "host": host or platform.node()}))


def table(results: Path) -> dict[str, str]:
    """The table's rows by cell."""
    lines = describe_status(results).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("----"))
    end = lines.index("", start)
    width = lines[start].index(" ")
    return {line[:width].strip(): " ".join(line[width:].split()) for line in lines[start + 1 : end]}


def test_each_cell_says_what_became_of_it_and_where_its_log_is(results: Path) -> None:
    rows = table(results)
    logs = f"{results}/tiny"
    assert rows == {
        "tiny": f"done {logs}/calibration/logs/calibrate.log",
        "tiny L0_4 seed_0": f"done 4.04 0.77 {logs}/L0_4/seed_0/logs/evaluate.log",
        "tiny L0_8 seed_0": (
            f"running phase1 140/1940 07:30 14.8 0.751 {logs}/L0_8/seed_0/logs/phase1.log"
        ),
        "tiny L0_16 seed_0": (
            f"stopped phase1 140/1940 14.8 0.751 {logs}/L0_16/seed_0/logs/phase1.log"
        ),
        "tiny L0_32 seed_0": (
            f"waiting after phase1 14.8 0.751 {logs}/L0_32/seed_0/logs/phase1.log"
        ),
    }


def test_what_failed_says_its_last_line(results: Path) -> None:
    said = describe_status(results)
    assert "tiny L0_16 seed_0 phase1 stopped: spalf: x: the disk is full\n" in said
    assert describe_stopped(results).count("stopped: ") == 1


def test_the_progress_line_read_is_the_one_that_is_written(
    results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lines = _Lines("phase 2", 300, 0)
    lines.update(120, {"L0": 7.94, "R2": 0.8125})
    lines.close()
    log = results / "tiny" / "L0_8" / "seed_0" / "logs" / "phase1.log"
    write(log, f"{PLACE}12:00:00 INFO {caplog.messages[-1]}\n")
    (found,) = [s.progress for s in sweep_status(results) if s.state == "running"]
    assert found is not None
    assert (found.done, found.total) == ("120", "300")
    assert found.shown == {"L0": "7.94", "R2": "0.812"}


def test_a_process_that_is_gone_does_not_run(results: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cell = results / "tiny" / "L0_8" / "seed_0"
    for pid, host in ((gone.pid, None), (os.getpid(), "another-host")):
        hold(cell / "phase1.checkpoints", pid, host)
        (found,) = [s for s in sweep_status(results) if s.cell.endswith("L0_8 seed_0")][1:]
        assert found.state == "stopped"
        assert found.reason.startswith("it ended without a word after: 12:00:10 INFO phase 1: 140")


def test_a_configuration_adds_what_was_not_started(results: Path) -> None:
    config = results.parent / "config.yaml"
    write(config, json.dumps({**SMALL, "grid": {"L0_target": [4, 64], "seed": [0]}}))
    done = CliRunner().invoke(status, [str(results), "--configfile", str(config)])
    assert done.exit_code == 0, done.output
    assert [line for line in done.output.splitlines() if "not started" in line] == [
        "tiny L0_64 seed_0  not started"
    ]


def test_nothing_at_all_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(status, [str(tmp_path)])
    assert done.output == f"nothing was started under {tmp_path}\n"


def test_imported_saes_and_pages_are_named_too(results: Path) -> None:
    """The steps that a sweep has only when asked to."""
    cell = results / "tiny" / "L0_4" / "seed_0"
    write(cell / "logs" / "dashboard.log", "job 5 on n2\nspalf: no room\n")
    imported = results / "tiny" / "imported" / "theirs"
    write(imported / "logs" / "evaluate.log", "job 7 on n3\nspalf: --sae: is too wide\n")
    slurm = results / "logs" / "slurm" / "rule_evaluate_imported" / "tiny_theirs" / "7.log"
    write(slurm, "slurmstepd: error: *** JOB 7 ON n3 CANCELLED AT 12:01 DUE TO TIME LIMIT ***\n")
    said = describe_stopped(results)
    assert "tiny L0_4 seed_0 dashboard stopped: spalf: no room\n    job 5 on n2" in said
    assert "tiny imported theirs evaluate stopped: CANCELLED AT 12:01 DUE TO TIME LIMIT" in said
    assert f"job 7 on n3; log: {imported}/logs/evaluate.log, {slurm}" in said
    rows = table(results)
    assert rows["tiny L0_4 seed_0"].startswith("stopped dashboard")
    write(cell / "dashboard.html", "a page")
    write_evaluation(imported / "evaluation.json", "tiny", 4.0)
    assert table(results)["tiny L0_4 seed_0"].startswith("done 4.04")
    assert table(results)["tiny imported theirs"].startswith("done 4.04")


def test_random_saes_are_done_where_baselines_would_be(results: Path) -> None:
    cell = results / "tiny" / "random" / "L0_4" / "seed_0"
    write(cell / "logs" / "random.log", PLACE)
    assert table(results)["tiny random L0_4 seed_0"].startswith("stopped random")
    write(cell / "baseline" / "metadata.json", "{}")
    assert table(results)["tiny random L0_4 seed_0"].startswith("waiting after random")
    write_evaluation(cell / "evaluation.json", "tiny", 4.0)
    write(cell / "logs" / "evaluate.log", PLACE)
    assert table(results)["tiny random L0_4 seed_0"].startswith("done")
