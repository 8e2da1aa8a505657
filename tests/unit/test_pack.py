"""Several SAEs on one stream of activations: each as if it had been trained alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spalf.activations import ActivationStore
from spalf.checkpoint import read_checkpoint
from spalf.config import RunConfig
from spalf.errors import Interrupted, UserError
from spalf.steps.initialise import initialise_step
from spalf.steps.train import pack, phase1, phase2
from tests.helpers_planted import (
    PlantedContext,
    PlantedModel,
    context,
    planted_config,
    run_phases,
    write_calibration,
)

STEPS = 80
CELLS = [(4.0, 0), (6.0, 0), (4.0, 1)]
FILES = ("model", "tensors", "control", "optimizer")


def config_of(l0_target: float, seed: int) -> RunConfig:
    return planted_config(
        STEPS, L0_target=l0_target, seed=seed, method={"phase2_fraction": 0.2, "anchors": False}
    )


def name_of(l0_target: float, seed: int) -> str:
    return f"L0_{l0_target:g}/seed_{seed}"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(config_of(4.0, 0), tmp_path_factory.mktemp("pack") / "calibration")


@pytest.fixture(scope="module")
def alone(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell trained by itself."""
    directory = tmp_path_factory.mktemp("alone")
    for cell in CELLS:
        run_phases(config_of(*cell), calibration, directory / name_of(*cell))
    return directory


def prepare(calibration: Path, directory: Path) -> dict[Path, RunConfig]:
    """The cells with their initial SAEs, ready to be packed."""
    cells = {directory / name_of(*cell): config_of(*cell) for cell in CELLS}
    for place, config in cells.items():
        initialise_step(config, calibration, place / "init", context())
    return cells


def assert_as_alone(directory: Path, alone: Path, cells: list[tuple[float, int]] = CELLS) -> None:
    for cell in cells:
        for phase in ("phase1", "phase2"):
            here, there = (base / name_of(*cell) / phase for base in (directory, alone))
            for file in FILES:
                one, two = (path / f"{file}.safetensors" for path in (here, there))
                assert one.read_bytes() == two.read_bytes(), one
            assert (here / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
            one, two = (read_checkpoint(path).metadata for path in (here, there))
            assert one["fingerprint"] == two["fingerprint"]
            assert one["state"] == two["state"]


def test_every_cell_ends_as_it_would_alone(calibration: Path, alone: Path, tmp_path: Path) -> None:
    pack(prepare(calibration, tmp_path), calibration, tmp_path / "pack.json", context())
    assert_as_alone(tmp_path, alone)
    report = json.loads((tmp_path / "pack.json").read_text(encoding="utf-8"))
    assert report["cells"] == [str(tmp_path / name_of(*cell)) for cell in CELLS]
    assert report["diverged"] == {}


def test_the_language_model_works_once_for_all(calibration: Path, tmp_path: Path) -> None:
    """Beyond one cell, each costs its own patched passes in Phase 2 and nothing else."""
    one, three = context(), context()
    cells = prepare(calibration, tmp_path / "three")
    pack(cells, calibration, tmp_path / "three.json", three)
    first = {tmp_path / "one": config_of(*CELLS[0])}
    initialise_step(config_of(*CELLS[0]), calibration, tmp_path / "one/init", one)
    pack(first, calibration, tmp_path / "one.json", one)
    patched = 64 + 4 * (STEPS // 5)  # at the entry, and one a step
    entry_of_each = 64  # clean passes at the entry are not shared: cells enter one by one
    more = len(three.model.calls) - len(one.model.calls)
    assert more <= (len(CELLS) - 1) * (patched + entry_of_each)
    assert more >= (len(CELLS) - 1) * patched


@pytest.mark.parametrize("stop_after", [1, 20, 63, 66, 75])
def test_a_pack_that_is_stopped_goes_on_to_the_same_end(
    calibration: Path, alone: Path, tmp_path: Path, stop_after: int
) -> None:
    cells, out = prepare(calibration, tmp_path), tmp_path / "pack.json"
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > stop_after * len(CELLS)

    with pytest.raises(Interrupted):
        pack(cells, calibration, out, context(stop))
    assert not out.exists()
    pack(cells, calibration, out, context())
    assert_as_alone(tmp_path, alone)


def test_cells_at_different_steps_catch_up(calibration: Path, alone: Path, tmp_path: Path) -> None:
    """One cell is finished, one is in the middle, one is new."""
    cells = prepare(calibration, tmp_path)
    (first, first_config), (second, second_config), _ = cells.items()
    phase1(first_config, calibration, first / "init", first / "phase1", context())
    phase2(first_config, calibration, first / "phase1", first / "phase2", context())
    before = (first / "phase2" / "metadata.json").stat().st_mtime_ns
    asked = iter(range(10**6))
    with pytest.raises(Interrupted):
        phase1(
            second_config,
            calibration,
            second / "init",
            second / "phase1",
            context(lambda: next(asked) > 30),
        )
    pack(cells, calibration, tmp_path / "pack.json", context())
    assert_as_alone(tmp_path, alone)
    assert (first / "phase2" / "metadata.json").stat().st_mtime_ns == before


def spoil(monkeypatch: pytest.MonkeyPatch, seed: int, at_step: int) -> None:
    """Put a NaN into one batch of the runs with this seed."""
    batches = ActivationStore.batches

    def spoiled(
        store: ActivationStore,
        batch_size: int,
        block_tokens: int,
        run_seed: int,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> Iterator[Tensor]:
        stream = batches(store, batch_size, block_tokens, run_seed, start_step, end_step)
        for step, batch in enumerate(stream, start=start_step):
            if step == at_step and run_seed == seed:
                batch = torch.full_like(batch, torch.nan)
            yield batch

    monkeypatch.setattr(ActivationStore, "batches", spoiled)


def test_a_cell_that_diverges_does_not_stop_the_others(
    calibration: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, out = prepare(calibration, tmp_path), tmp_path / "pack.json"
    spoil(monkeypatch, seed=1, at_step=33)
    pack(cells, calibration, out, context())
    report = json.loads(out.read_text(encoding="utf-8"))
    bad = tmp_path / name_of(4.0, 1)
    assert list(report["diverged"]) == [str(bad)]
    assert "activations not finite at step 34" in report["diverged"][str(bad)]
    assert not (bad / "phase1").exists()
    assert_as_alone(tmp_path, alone, CELLS[:2])
    monkeypatch.undo()
    phase1(config_of(4.0, 1), calibration, bad / "init", bad / "phase1", context())
    phase2(config_of(4.0, 1), calibration, bad / "phase1", bad / "phase2", context())
    assert_as_alone(tmp_path, alone)


def test_a_batch_that_is_passed_over_is_passed_over_by_its_own_cell(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = prepare(calibration, tmp_path)
    spoil(monkeypatch, seed=1, at_step=33)
    allowed = dataclasses.replace(context(), skip_nonfinite=1)
    pack(cells, calibration, tmp_path / "pack.json", allowed)
    skipped = [read_checkpoint(place / "phase2").metadata["state"]["skipped"] for place in cells]
    assert [len(found) for found in skipped] == [0, 0, 1]


def test_blocks_harvested_ahead_change_no_result(
    calibration: Path, alone: Path, tmp_path: Path
) -> None:
    cells = {
        place: config.model_copy(
            update={"runtime": config.runtime.model_copy(update={"overlap": True})}
        )
        for place, config in prepare(calibration, tmp_path).items()
    }
    pack(cells, calibration, tmp_path / "pack.json", context())
    assert_as_alone(tmp_path, alone)


def test_cells_of_two_streams_are_refused(calibration: Path, tmp_path: Path) -> None:
    cells = {tmp_path / "one": config_of(4.0, 0), tmp_path / "two": planted_config(STEPS + 1)}
    with pytest.raises(UserError, match="cannot differ in total_tokens"):
        pack(cells, calibration, tmp_path / "pack.json", context())
    assert not list(tmp_path.iterdir())


def test_taking_a_result_that_is_not_there_is_refused(calibration: Path, tmp_path: Path) -> None:
    config = config_of(4.0, 0)
    initialise_step(config, calibration, tmp_path / "init", context())
    taking = PlantedContext(
        torch.device("cpu"), lambda: False, context().progress, model=PlantedModel(),
        finished_only=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"delete the pack\.json"):
        phase1(config, calibration, tmp_path / "init", tmp_path / "phase1", taking)
    phase1(config, calibration, tmp_path / "init", tmp_path / "phase1", context())
    phase1(config, calibration, tmp_path / "init", tmp_path / "phase1", taking)
