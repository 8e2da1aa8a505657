"""A result that a workflow deletes just after it was finished is put back, not made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import STEPS, Run, assert_no_litter


def files(result: Run, step: str) -> dict[Path, int]:
    """Inode of each file of a step's result."""
    out = result.output(step)
    found = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {path: path.stat().st_ino for path in found}


def delete(made: dict[Path, int]) -> None:
    """As Snakemake does before it runs a step: files go, directories stay."""
    for path in made:
        path.unlink()


@pytest.mark.parametrize("step", STEPS)
def test_the_twin_of_a_job_that_finished_takes_its_result(
    fresh: Callable[[str], Run], step: str
) -> None:
    result = fresh(step)
    first = result.run(step, None, "--if-locked", "wait")
    assert first.status == 0, first.errors
    made = files(result, step)
    assert made
    delete(made)
    twin = result.run(step, None, "--if-locked", "wait")
    assert twin.status == 0, twin.errors
    assert files(result, step) == made
    assert "was finished by an earlier job" in twin.errors
    assert_no_litter(result)


def test_a_damaged_second_copy_is_not_taken(fresh: Callable[[str], Run]) -> None:
    result = fresh("phase1")
    assert result.run("phase1", None, "--if-locked", "wait").status == 0
    wanted = (result.output("phase1") / "model.safetensors").read_bytes()
    delete(files(result, "phase1"))
    (kept,) = result.working("phase1").glob("finished_*")
    with (kept / "model.safetensors").open("r+b") as file:
        file.write(b"damaged")
    again = result.run("phase1", None, "--if-locked", "wait")
    assert again.status == 0, again.errors
    assert f"making {result.output('phase1')} again" in again.errors
    assert (result.output("phase1") / "model.safetensors").read_bytes() == wanted


def test_without_links_the_step_is_done_again(fresh: Callable[[str], Run]) -> None:
    def no_links() -> None:
        def refuse(self: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted", str(self))

        Path.hardlink_to = refuse  # type: ignore[method-assign, assignment]

    result = fresh("evaluate")
    for _ in range(2):
        outcome = result.start("evaluate", no_links, "--if-locked", "wait").wait()
        assert outcome.status == 0, outcome.errors
        delete(files(result, "evaluate"))
    assert not list(result.working("evaluate").glob("finished_*/*.json"))


def test_a_result_deleted_by_hand_stays_deleted(fresh: Callable[[str], Run]) -> None:
    result = fresh("evaluate")
    assert result.run("evaluate").status == 0
    made = files(result, "evaluate")
    kept = result.directory / "other name"
    shutil.copyfile(result.output("evaluate"), kept)
    delete(made)
    again = result.run("evaluate")
    assert again.status == 0, again.errors
    assert "was finished by an earlier job" not in again.errors
    assert result.output("evaluate").read_bytes() == kept.read_bytes()
