"""Truncated, altered, missing and foreign files are found, named, and gone round where possible."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.conftest import COMPARED, MADE_BY, Run, assert_same, small_config
from tests.faults.harness import run

FILES = (
    "model.safetensors",
    "tensors.safetensors",
    "control.safetensors",
    "optimizer.safetensors",
    "metadata.json",
    "metrics.jsonl",
)


@pytest.fixture(scope="module")
def interrupted(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A Phase 1 killed with two checkpoints on the disk."""
    result = Run(tmp_path_factory.mktemp("interrupted") / "run", reference.config)
    result.directory.mkdir()
    for step in ("calibrate", "init"):
        shutil.copytree(reference.output(step), result.output(step))
    assert result.run("phase1", _killed_at_step(30)).status == -signal.SIGKILL
    return result


def _killed_at_step(number: int) -> Callable[[], None]:
    def install() -> None:
        import os

        from spalf.training import graph

        step = graph.train_step

        def counted(state: Any, *args: Any) -> Any:
            if state.step == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(state, *args)

        graph.train_step = counted

    return install


def _copy(source: Run, tmp_path: Path) -> Run:
    result = Run(tmp_path / "run", source.config)
    shutil.copytree(source.directory, result.directory)
    return result


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    where = random.Random(str(path.name)).randrange(len(data))
    data[where] ^= 1 << 3
    path.write_bytes(bytes(data))


def _remove(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_digit(path: Path) -> None:
    """Still JSON, with another result."""
    text = path.read_text()
    start = text.index('"explained_variance"')
    where = text.index(".", start) + 2
    path.write_text(f"{text[:where]}{(int(text[where]) + 1) % 10}{text[where + 1 :]}")


def _foreign(path: Path) -> None:
    """A file of the same name from elsewhere: whole, but not the one that was written."""
    other = path.parent.with_name("step_000000016") / path.name
    assert other.read_bytes() != path.read_bytes()
    path.write_bytes(other.read_bytes())


DAMAGE = [_truncate, _flip, _remove, _empty]
NEVER_CHANGES = "tensors.safetensors"
METADATA = "metadata.json"  # of another checkpoint, whole, with its own digests


@pytest.mark.parametrize("name", [name for name in FILES if name != NEVER_CHANGES])
def test_a_foreign_file_in_a_checkpoint_is_named_and_the_one_before_it_used(
    name: str, interrupted: Run, reference: Run, tmp_path: Path
) -> None:
    result = _copy(interrupted, tmp_path)
    newest = sorted(result.working("phase1").glob("step_*"))[-1]
    _foreign(newest / name)
    outcome = result.run("phase1")
    assert outcome.status == 0, outcome.errors
    assert f"{newest}/" in outcome.errors and "does not match its digest" in outcome.errors
    assert name == METADATA or f"{newest / name}" in outcome.errors
    assert "at step 16" in outcome.errors
    assert_same(result, reference, COMPARED[:2])


def test_i9_nothing_of_the_buffer_is_in_a_checkpoint(interrupted: Run) -> None:
    """What a checkpoint holds is known by name, and no larger than the SAE asks for."""
    from safetensors.numpy import load_file

    from spalf.config import RunConfig, schedule

    config = RunConfig.model_validate(yaml.safe_load(interrupted.config.read_text()))
    newest = sorted(interrupted.working("phase1").glob("step_*"))[-1]
    d_model = 64
    largest = max(config.F, d_model) * d_model
    assert {path.name for path in newest.iterdir()} == set(FILES)
    for path in newest.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.size <= largest, (path.name, name, tensor.shape)
    assert schedule(config).block_tokens * d_model > largest


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    name: str, damage: Callable[[Path], None], interrupted: Run, reference: Run, tmp_path: Path
) -> None:
    result = _copy(interrupted, tmp_path)
    newest = sorted(result.working("phase1").glob("step_*"))[-1]
    damage(newest / name)
    outcome = result.run("phase1")
    assert outcome.status == 0, outcome.errors
    assert f"{newest / name}" in outcome.errors
    assert "resuming" in outcome.errors and "at step 16" in outcome.errors
    assert_same(result, reference, COMPARED[:2])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("step", "owner", "name", "file"),
    [
        ("calibrate", "spalf.whitening:SplitHalfCovariance", "update", "calibration"),
        ("evaluate", "spalf.evaluation:DownstreamMeasurement", "add", "measurement"),
        ("baseline", "sae_lens:SAETrainer", "step", "rate_1"),
    ],
)
def test_damaged_checkpoints_of_other_steps_are_gone_round_as_well(
    step: str,
    owner: str,
    name: str,
    file: str,
    damage: Callable[[Path], None],
    reference: Run,
    fresh: Callable[[str], Run],
) -> None:
    result = fresh(step)
    every = ("--runtime", '{"checkpoint_every_steps": 2}')
    outcome = result.run(step, _killed_at_call(owner, name, 11), *every)
    assert outcome.status == -signal.SIGKILL, outcome.errors
    newest = sorted(result.working(step).glob("step_*"))[-1]
    damage(newest / f"{file}.safetensors")
    outcome = result.run(step, None, *every)
    assert outcome.status == 0, outcome.errors
    assert f"{newest / file}.safetensors" in outcome.errors and "resuming" in outcome.errors
    assert_same(result, reference, MADE_BY[step])


def _killed_at_call(place: str, name: str, number: int) -> Callable[[], None]:
    def install() -> None:
        import importlib
        import os

        module, owner_name = place.split(":")
        owner = getattr(importlib.import_module(module), owner_name)
        function, calls = getattr(owner, name), [0]

        def counted(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        setattr(owner, name, counted)

    return install


def test_with_every_checkpoint_damaged_the_phase_starts_anew(
    interrupted: Run, reference: Run, tmp_path: Path
) -> None:
    result = _copy(interrupted, tmp_path)
    for path in result.working("phase1").glob("step_*"):
        _flip(path / "optimizer.safetensors")
    outcome = result.run("phase1")
    assert outcome.status == 0, outcome.errors
    assert_same(result, reference, COMPARED[:2])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "calibration/calibration.safetensors",
        "calibration/metadata.json",
        "calibration/tokens/train.npy",
        "calibration/tokens/tokens.json",
        "init/model.safetensors",
        "init/metadata.json",
    ],
)
def test_damaged_inputs_of_a_step_are_named(
    name: str, damage: Callable[[Path], None], fresh: Callable[[str], Run]
) -> None:
    result = fresh("phase1")
    damage(result.directory / name)
    outcome = result.run("phase1")
    assert outcome.status == 2, outcome.errors
    assert str(result.directory / name) in outcome.lines[-1]
    assert "Traceback" not in outcome.errors
    assert not result.working("phase1").exists()


@pytest.mark.parametrize("damage", [_truncate, _flip_a_digit, _remove, _empty])
def test_a_damaged_evaluation_is_named_and_made_again(
    damage: Callable[[Path], None], reference: Run, tmp_path: Path
) -> None:
    result = _copy(reference, tmp_path)
    report = result.output("evaluate")
    damage(report)
    outcome = run(["spalf", "aggregate", "--out", str(tmp_path / "t"), str(report)], tmp_path / "e")
    assert outcome.status == 2
    assert str(report) in outcome.lines[-1] and "Traceback" not in outcome.errors
    assert not (tmp_path / "t").exists()
    again = result.run("evaluate")
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY["evaluate"])


@pytest.mark.parametrize("name", FILES)
def test_evaluate_refuses_a_damaged_phase(name: str, fresh: Callable[[str], Run]) -> None:
    result = fresh("evaluate")
    _flip(result.directory / "phase2" / name)
    outcome = result.run("evaluate")
    assert outcome.status == 2
    assert str(result.directory / "phase2" / name) in outcome.lines[-1]
    assert not (result.directory / "evaluation.json").exists()


def _with_config(source: Run, tmp_path: Path, corpus: Path, **changes: Any) -> Run:
    result = _copy(source, tmp_path)
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(small_config(corpus, **changes)), encoding="utf-8")
    return Run(result.directory, config)


def test_a_checkpoint_of_other_settings_is_refused_with_the_differing_fields(
    interrupted: Run, tmp_path: Path, corpus: Path
) -> None:
    changes = {"lr": 0.003, "R2_target": 0.9, "method": {"phase2_fraction": 0.2, "capu": False}}
    result = _with_config(interrupted, tmp_path, corpus, **changes)
    before = _tree(result.directory)
    outcome = result.run("phase1")
    assert outcome.status == 2
    for field in (
        "lr (0.004 there, 0.003 here)",
        "R2_target (0.99 there, 0.9 here)",
        "method.capu (True there, False here)",
    ):
        assert field in outcome.lines[-1]
    assert "phase2_fraction" not in outcome.lines[-1]
    assert _tree(result.directory) == before


def test_restarting_sets_the_other_run_aside_and_going_back_finds_it(
    interrupted: Run, reference: Run, tmp_path: Path, corpus: Path
) -> None:
    result = _with_config(interrupted, tmp_path, corpus, lr=0.003)
    outcome = result.run("phase1", None, "--if-foreign", "restart")
    assert outcome.status == 0, outcome.errors
    assert "lr (0.004 there, 0.003 here)" in outcome.errors
    shutil.rmtree(result.output("phase1"))
    back = Run(result.directory, interrupted.config)
    outcome = back.run("phase1", None, "--if-foreign", "restart")
    assert outcome.status == 0, outcome.errors
    assert "at step 24" in outcome.errors
    assert_same(back, reference, COMPARED[:2])


def test_a_checkpoint_of_another_format_is_refused(interrupted: Run, tmp_path: Path) -> None:
    result = _copy(interrupted, tmp_path)
    for path in result.working("phase1").glob("step_*"):
        metadata = json.loads((path / "metadata.json").read_text())
        metadata["format_version"] = metadata["fingerprint"]["format_version"] = 1
        (path / "metadata.json").write_text(json.dumps(metadata))
    outcome = result.run("phase1")
    assert outcome.status == 2
    assert "format_version (1 there, 2 here)" in outcome.lines[-1]


def test_a_calibration_of_another_state_of_the_model_is_refused(
    reference: Run, tmp_path: Path, corpus: Path
) -> None:
    from spalf.models import resolve_model

    model = tmp_path / "model"
    shutil.copytree(resolve_model("spalf/demo-2l"), model)
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump(small_config(corpus, model_name=str(model))))
    result = Run(tmp_path / "run", config)
    for step in ("calibrate", "init"):
        outcome = result.run(step)
        assert outcome.status == 0, outcome.errors
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(bytes(data))
    outcome = result.run("phase1")
    assert outcome.status == 2
    assert "input.model" in outcome.lines[-1]


def test_a_finished_result_of_other_settings_is_not_overwritten(
    fresh: Callable[[str], Run], tmp_path: Path, corpus: Path
) -> None:
    result = fresh("phase2")
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(small_config(corpus, lr=0.003)))
    before = _tree(result.output("phase1"))
    outcome = Run(result.directory, config).run("phase1")
    assert outcome.status == 2
    assert "lr (0.004 there, 0.003 here)" in outcome.lines[-1]
    assert _tree(result.output("phase1")) == before


def test_a_calibration_of_another_dataset_is_refused(
    fresh: Callable[[str], Run], tmp_path: Path, corpus: Path
) -> None:
    result = fresh("init")
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(small_config(corpus, dataset="python-stdlib")))
    outcome = Run(result.directory, config).run("init")
    assert outcome.status == 2
    assert "dataset.path" in outcome.lines[-1]
    assert not result.output("init").exists()


def _tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "holder.json"  # left by the killed process
    }


def test_nothing_that_spalf_loads_is_a_pickle(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    """With pickle's loader taken away, every step still works."""

    def install() -> None:
        import pickle

        import torch

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("a pickle was loaded")

        pickle.loads = pickle.load = torch.load = never  # type: ignore[assignment]

    for step in ("calibrate", "phase1", "evaluate"):
        (tmp_path / step).mkdir()
        outcome = fresh_at(reference, tmp_path / step, step).run(step, install)
        assert outcome.status == 0, outcome.errors


def fresh_at(reference: Run, directory: Path, step: str) -> Run:
    result = Run(directory / "run", reference.config)
    shutil.copytree(reference.directory, result.directory)
    result.forget(step)
    return result
