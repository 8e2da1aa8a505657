"""What a cluster does to a sweep, and that the sweep comes out the same.

After each fault the final ``frontier.csv`` equals, byte for byte, that of an undisturbed run on one
machine, and no finished step was made twice.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from spalf.config import RunConfig, load_sweep
from tests.slurm.cluster import (
    PATIENCE,
    Cluster,
    Job,
    asked_to_end,
    command_of,
    freeze,
    processes_of,
    wait_until,
)
from tests.slurm.conftest import CELL, OTHER, Clone
from workflow import resources

pytestmark = [pytest.mark.timeout(2 * PATIENCE)]

TRAINING = b"/spalf phase1 "
"""In the command line of a Phase 1."""
STEPS = ("phase1", "phase2", "evaluate")


def finish(clone: Clone, process: subprocess.Popen[bytes], reference: Clone) -> None:
    """Wait for the end of the sweep and check what must hold after every fault."""
    assert process.wait(PATIENCE) == 0, clone.said()
    assert clone.frontier() == reference.frontier()
    assert not clone.remade
    assert not list(clone.path.glob("results/**/*.checkpoints"))


def resumed_at(clone: Clone) -> int:
    """The step at which the last Phase 1 job continued."""
    found = re.search(r"resuming .* at step (\d+)", clone.text(f"{CELL}/logs/phase1.log"))
    assert found, clone.text(f"{CELL}/logs/phase1.log")
    return int(found[1])


def waits(clone: Clone) -> bool:
    """Whether the last Phase 1 job found another one at work, and said so."""
    log = clone.path / CELL / "logs" / "phase1.log"
    return log.exists() and "waiting" in log.read_text(encoding="utf-8")


def asked_for(
    clone: Clone, model: str = "demo-2l", attempt: int = 1, *, measured: bool = True
) -> tuple[RunConfig, int, resources.Site | None]:
    """What the resources of the steps of a model's first cell follow from."""
    sweep = load_sweep(clone.path / "config/config.yaml")
    config = sweep.run_config(next(cell for cell in sweep.cells() if cell.model == model))
    metadata = clone.path / f"results/{model}/calibration/metadata.json"
    return config, attempt, resources.measured_site(metadata) if measured else None


def memory(job: Job) -> int:
    """Megabytes that a job asked for."""
    found = re.search(r"mem=([\d.]+)([MG])", job.tres)
    assert found, job.tres
    return round(float(found[1]) * {"M": 1, "G": 1024}[found[2]])


def assert_same_cell(clone: Clone, reference: Clone) -> None:
    """What was measured on the first cell of a larger grid is what it is alone."""
    here, there = (json.loads(c.text(f"{CELL}/evaluation.json")) for c in (clone, reference))
    assert here["phases"] == there["phases"]


def test_every_step_is_a_job_on_a_gpu_node(
    cluster: Cluster, reference: Clone, tmp_path: Path
) -> None:
    clone = Clone(tmp_path, cluster)
    finish(clone, clone.sweep(), reference)
    clone.end()
    jobs = clone.jobs()
    assert sorted(job.step for job in jobs) == sorted(2 * ["calibrate", "init", *STEPS])
    for job in jobs:
        model = "demo-4l" if "demo-4l" in job.comment else "demo-2l"
        known = asked_for(clone, model, measured=job.step != "calibrate")
        assert job.state == "COMPLETED"
        assert job.node in ("n2", "n3")
        assert job.gpus == 1
        assert job.minutes == resources.minutes(job.step, *known)
        assert memory(job) == resources.memory_mb(job.step, *known)
        assert "cpu=1," in job.tres
    assert re.search(r"job \d+ on n[23], GPU \d", clone.text(f"{CELL}/logs/phase1.log"))


def test_cancelled_job_is_retried_from_its_checkpoint(
    cluster: Cluster, clone: Clone, reference: Clone
) -> None:
    process = clone.sweep()
    job = clone.wait_for_training()
    interpreter = os.fsencode(clone.path / ".venv/bin/python")
    assert b" " in interpreter
    assert any(command_of(pid).startswith(interpreter) for pid in processes_of(job.id))
    cluster.call("scancel", job.id)
    finish(clone, process, reference)
    assert [job.state for job in clone.jobs("phase1")] == ["CANCELLED", "COMPLETED"]
    assert resumed_at(clone) > 0


@pytest.mark.parametrize("processes_too", [True, False], ids=["with its processes", "cut off"])
def test_lost_node(
    cluster: Cluster, clone: Clone, reference: Clone, *, processes_too: bool
) -> None:
    process = clone.sweep()
    job = clone.wait_for_training()
    cluster.lose_node(job.node, job.id, processes_too=processes_too)
    try:
        if not processes_too:  # the job that lives on must not be done before the second one comes
            freeze(job.id, TRAINING, lambda: waits(clone), "the second job to wait")
        finish(clone, process, reference)
    finally:
        cluster.return_node(job.node)
    (again,) = clone.jobs("phase1")
    assert (again.id, again.restarts) == (job.id, 1)
    assert again.node != job.node
    assert processes_too or waits(clone)
    assert not processes_too or resumed_at(clone) > 0


def test_orphan_that_finishes_before_its_twin_begins(
    cluster: Cluster, clone: Clone, reference: Clone
) -> None:
    """Snakemake deletes the orphan's result when the twin begins; it is put back."""
    process = clone.sweep()
    job = clone.wait_for_training()
    cluster.lose_node(job.node, job.id, processes_too=False)
    try:
        wait_until(lambda: clone.jobs("phase1")[0].restarts == 1, "the job to be requeued")
        cluster.call("scontrol", "hold", job.id)
        wait_until((clone.path / CELL / "phase1/metadata.json").exists, "the orphan's result")
        wait_until(lambda: not pythons(job.id), "the orphan's end")
        assert clone.jobs("phase1")[0].state == "PENDING"
        cluster.call("scontrol", "release", job.id)
        finish(clone, process, reference)
    finally:
        cluster.return_node(job.node)
    assert "was finished by an earlier job" in clone.text(f"{CELL}/logs/phase1.log")


def pythons(job: str) -> list[int]:
    return [pid for pid in processes_of(job) if b"python" in command_of(pid)]


def test_controller_goes_away(cluster: Cluster, clone: Clone, reference: Clone) -> None:
    """For two minutes, at a site with GPUs of several kinds."""
    clone.set_resources(gpu_model="pretend")
    process = clone.sweep()
    clone.wait_for_training()
    cluster.kill_controller()
    time.sleep(120)
    cluster.start_controller()
    finish(clone, process, reference)
    assert [job.state for job in clone.jobs("phase1")] == ["COMPLETED"]
    assert all(job.gpus == 1 for job in clone.jobs())


def test_time_limit(cluster: Cluster, clone: Clone, reference: Clone) -> None:
    """The job under way gets a limit one to two minutes from now, and stands still until then."""
    process = clone.sweep()
    job = clone.wait_for_training()
    *_, minutes, _ = cluster.call("squeue", "--noheader", "--jobs", job.id, "--format=%M").split(
        ":"
    )
    cluster.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={int(minutes) + 2}")
    freeze(job.id, TRAINING, lambda: asked_to_end(job.id, TRAINING), "the signal of the limit")
    finish(clone, process, reference)
    first, last = clone.jobs("phase1")
    assert first.state in ("FAILED", "TIMEOUT")
    assert last.state == "COMPLETED"
    assert last.minutes == resources.minutes("phase1", *asked_for(clone, attempt=2))
    assert last.minutes > resources.minutes("phase1", *asked_for(clone))
    assert resumed_at(clone) > 0


def test_preempted_job_is_requeued(cluster: Cluster, clone: Clone, reference: Clone) -> None:
    """At a site that wants ``--gres``."""
    clone.set_resources(gpu=0, gres="gpu:pretend:1")
    process = clone.sweep()
    job = clone.wait_for_training()
    cluster.call(
        *("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 5"),
    )
    finish(clone, process, reference)
    (again,) = clone.jobs("phase1")
    assert (again.id, again.restarts) == (job.id, 1)
    assert resumed_at(clone) > 0
    assert all(job.gpus == 1 for job in clone.jobs())


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL", "SIGHUP"])
def test_killed_snakemake_is_started_again(clone: Clone, reference: Clone, how: str) -> None:
    """A terminal that closes sends SIGHUP to everything in it."""
    process = clone.sweep()
    clone.wait_for_training()
    (os.killpg if how == "SIGHUP" else os.kill)(process.pid, signal.Signals[how])
    assert process.wait(PATIENCE) != 0
    if how in ("SIGKILL", "SIGHUP"):
        refused = clone.sweep()
        assert refused.wait(PATIENCE) == 1
        assert "snakemake --unlock" in clone.said()
        assert clone.start("--unlock").wait(PATIENCE) == 0
    finish(clone, clone.sweep(), reference)


def test_orphan_that_finished_meanwhile_is_accepted(clone: Clone, reference: Clone) -> None:
    process = clone.sweep()
    clone.wait_for_training()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: clone.jobs("phase1")[0].over, "the orphan's end")
    assert clone.start("--unlock").wait(PATIENCE) == 0
    finish(clone, clone.sweep(), reference)
    assert len(clone.jobs("phase1")) == 1


def test_job_that_always_fails(cluster: Cluster, reference: Clone, tmp_path: Path) -> None:
    clone = Clone(tmp_path, cluster)
    clone.continue_from(reference, of=(CELL, OTHER))
    damaged = clone.path / OTHER / "phase1.checkpoints"
    damaged.write_text("a file where a directory must be", encoding="utf-8")
    clone.edit_profile("# max_runtime: 1440 ", "max_runtime: 12 ")
    process = clone.sweep()
    assert process.wait(PATIENCE) == 1, clone.said()
    failed = [job for job in clone.jobs("phase1") if "demo-4l" in job.comment]
    assert [job.state for job in failed] == ["FAILED"] * 3
    assert [job.minutes for job in failed] == [12] * 3
    assert_same_cell(clone, reference)
    assert [memory(job) for job in failed] == [
        resources.memory_mb("phase1", *asked_for(clone, "demo-4l", attempt))
        for attempt in (1, 2, 3)
    ]
    told = [
        "demo-4l L0_4 seed_0 phase1 stopped: spalf: ",
        "phase1.checkpoints: File exists",
        f"job {failed[-1].id} on n",
        f"log: {OTHER}/logs/phase1.log, results/logs/slurm/rule_phase1/",
    ]
    summary = clone.said().split("1 step failed or stopped", 1)[1]
    status = ("spalf", "status", "results")
    shown = subprocess.run(
        status, cwd=clone.path, env=clone.environment(), capture_output=True, text=True
    ).stdout
    for words in told:
        assert words in summary and words in shown, (words, summary, shown)
    damaged.unlink()
    finish(clone, clone.sweep(), reference)
