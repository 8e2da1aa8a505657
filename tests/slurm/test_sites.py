"""What differs between sites: accounting, limits on jobs, arrays, groups, memory, preemption."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.accounting import ACCOUNT, AccountedCluster
from tests.slurm.cluster import PATIENCE, Cluster, processes_with, wait_until
from tests.slurm.conftest import CELL, TRAINED, Clone, booted, number, of_one_model
from tests.slurm.test_sweep import assert_same_cell, finish, memory, resumed_at

pytestmark = [pytest.mark.timeout(2 * PATIENCE)]


def test_accounting(accounted: AccountedCluster, reference: Clone, tmp_path: Path) -> None:
    """Only ``sacct`` knows how a job ended; jobs need an account that has one at a time."""
    clone = Clone(tmp_path, accounted)
    clone.continue_from(reference)
    clone.edit_profile("# slurm_account: my-account ", f"slurm_account: {ACCOUNT} ")
    process = clone.sweep("--jobs", "1")
    accounted.call("scancel", clone.wait_for_training().id)
    finish(clone, process, reference)
    clone.end()
    assert "Falling back to 'sacct'" in clone.said()
    jobs = [row for row in accounted.finished() if row[0].startswith("rule_")]
    assert {account for _, _, account in jobs} == {ACCOUNT}
    training = [state for comment, state, _ in jobs if comment.startswith("rule_phase1")]
    assert training == ["CANCELLED by 0", "COMPLETED"]
    assert resumed_at(clone) > 0


def test_job_that_preemption_cancels(cluster: Cluster, clone: Clone, reference: Clone) -> None:
    clone.edit_profile("slurm_partition: gpu ", "slurm_partition: spare ")
    process = clone.sweep()
    clone.wait_for_training()
    cluster.call(
        *("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 5"),
    )
    finish(clone, process, reference)
    assert [job.state for job in clone.jobs("phase1")] == ["PREEMPTED", "COMPLETED"]
    assert resumed_at(clone) > 0


def test_out_of_memory(clone: Clone, reference: Clone) -> None:
    process = clone.sweep("--set-resources", "phase1:mem_mb=4500 * attempt - 4200")
    finish(clone, process, reference)
    first, last = clone.jobs("phase1")
    assert (first.state, last.state) == ("FAILED", "COMPLETED")
    assert (memory(first), memory(last)) == (300, 4800)


def test_cells_as_groups(cluster: Cluster, reference: Clone, tmp_path: Path) -> None:
    clone = Clone(tmp_path, cluster, of_one_model(4, 8))
    clone.continue_from(reference)
    steps = ("init", "phase1", "phase2", "evaluate")
    process = clone.sweep("--groups", *(f"{step}=cell" for step in steps))
    assert process.wait(PATIENCE) == 0, clone.said()
    assert_same_cell(clone, reference)
    assert [job.state for job in clone.jobs()] == ["COMPLETED"] * 2
    assert [job.gpus for job in clone.jobs()] == [1, 1]


def test_steps_as_arrays(cluster: Cluster, reference: Clone, tmp_path: Path) -> None:
    """More jobs are ready than may be handed over at a time."""
    clone = Clone(tmp_path, cluster, of_one_model(4, 5, 6, 7, 8))
    clone.continue_from(reference, without=(*TRAINED, "init"))
    process = clone.sweep("--slurm-array-jobs", "all", "--jobs", "2", "--until", "init")
    assert process.wait(PATIENCE) == 0, clone.said()
    assert "Submitted array job" in clone.said()
    assert len(list(clone.path.glob("results/demo-2l/L0_*/seed_0/init/metadata.json"))) == 5
    assert len(clone.jobs()) == 5
    assert all(job.state == "COMPLETED" for job in clone.jobs())
    model = f"{CELL}/init/model.safetensors"
    assert (clone.path / model).read_bytes() == (reference.path / model).read_bytes()


def test_nothing_outlives_a_cluster(cluster: Cluster, worker_id: str, tmp_path: Path) -> None:
    """A process that left its job's family, of which Slurm here knows nothing any more."""
    mark = "SPALF_TEST_MARK=" + tmp_path.name
    with booted(Cluster, 20 + number(worker_id)) as own:
        job = own.call(
            *("sbatch", "--parsable", "--partition=gpu", "--output=/dev/null"),
            *(f"--export=ALL,{mark}", "--wrap", "setsid sleep 1000 & sleep 1"),
        )
        show = ("scontrol", "--oneliner", "show", "job", job)
        wait_until(lambda: "JobState=COMPLETED" in own.call(*show), "the job's end")
        assert processes_with(mark)
    assert not processes_with(mark)
    assert not processes_with(f"SLURM_CONF={own.environment['SLURM_CONF']}")
