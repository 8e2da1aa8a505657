"""Asked to stop, a step saves and leaves with status 75; two processes never share an output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import COMPARED, Run, assert_no_litter, assert_same

MADE_BY = {
    "calibrate": ("calibration/calibration.safetensors", "calibration/tokens/train.npy"),
    "init": ("init/model.safetensors",),
    "phase1": COMPARED[:2],
    "phase2": COMPARED[2:4],
    "evaluate": COMPARED[4:],
}


def _at(module: str, name: str, count: int, marker: Path) -> Callable[[], None]:
    """Make the ``count``-th call of a function say so in ``marker``, and take its time."""

    def install() -> None:
        import importlib

        *path, owner_name = module.split(":")
        owner: Any = importlib.import_module(path[0]) if path else importlib.import_module(module)
        owner = getattr(owner, owner_name) if path else owner
        function, calls = getattr(owner, name), [0]

        def slow(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                marker.touch()
                time.sleep(0.3)
            return function(*args, **kwargs)

        setattr(owner, name, slow)

    return install


PLACES = [
    ("calibrate", "spalf.data.pack:_Packer", "add", 1),
    ("calibrate", "spalf.data.pack:SplitWriter", "append", 20),
    ("calibrate", "spalf.whitening:SplitHalfCovariance", "update", 3),
    ("phase1", "spalf.training.graph", "train_step", 1),
    ("phase1", "spalf.training.graph", "train_step", 30),
    ("phase1", "spalf.activations:ActivationStore", "_read", 2),
    ("phase2", "spalf.training.graph", "train_step", 4),
    ("phase2", "spalf.activations:ActivationStore", "sequences", 3),
    ("evaluate", "spalf.data:SequenceStream", "sequences", 2),
    ("evaluate", "spalf.data:SequenceStream", "sequences", 6),
    ("evaluate", "spalf.evaluation:DownstreamMeasurement", "add", 10),
    ("evaluate", "spalf.evaluation:AbsorptionMeasurement", "add", 5),
]


@pytest.mark.parametrize(("step", "module", "name", "count"), PLACES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_leaves_with_75_and_goes_on(
    step: str,
    module: str,
    name: str,
    count: int,
    number: signal.Signals,
    reference: Run,
    fresh: Callable[[str], Run],
    tmp_path: Path,
) -> None:
    result, marker = fresh(step), tmp_path / "there"
    child = result.start(step, _at(module, name, count, marker))
    _wait_for(marker)
    asked = time.monotonic()
    child.kill(number)
    outcome = child.wait()
    assert outcome.status == 75, outcome.errors
    assert time.monotonic() - asked < 10
    assert "run the same command again to continue" in outcome.lines[-1]
    assert not (result.output(step) / "metadata.json").exists()
    assert not (result.directory / "evaluation.json").exists()
    assert_no_litter(result)
    again = result.run(step)
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY[step])


LONG_CALLS = [
    ("calibrate", "spalf.steps.context", "load_model"),
    ("calibrate", "spalf.steps.tokens", "load_tokenizer"),
    ("calibrate", "spalf.steps.calibrate:SoftZCA", "fit"),
    ("init", "spalf.steps.initialise", "initialise"),
    ("phase1", "spalf.steps.train", "load_calibration"),
    ("phase2", "spalf.steps.context", "load_model"),
    ("evaluate", "spalf.evaluation:AbsorptionMeasurement", "result"),
]


@pytest.mark.parametrize(("step", "module", "name"), LONG_CALLS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_long_call_with_nothing_to_save_is_left_at_once(
    step: str,
    module: str,
    name: str,
    number: signal.Signals,
    reference: Run,
    fresh: Callable[[str], Run],
    tmp_path: Path,
) -> None:
    result, marker = fresh(step), tmp_path / "there"
    child = result.start(step, _never_ending(module, name, marker))
    _wait_for(marker)
    child.kill(number)
    outcome = child.wait(timeout=10)
    assert outcome.status == 75, outcome.errors
    assert "run the same command again to continue" in outcome.lines[-1]
    assert not (result.output(step) / "metadata.json").exists()
    again = result.run(step)
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY[step])
    assert_no_litter(result)


def _never_ending(module: str, name: str, marker: Path) -> Callable[[], None]:
    """Replace a function by a call into C that no handler of Python's can interrupt."""

    def install() -> None:
        import importlib

        path, *owner_name = module.split(":")
        owner: Any = importlib.import_module(path)
        owner = getattr(owner, owner_name[0]) if owner_name else owner

        def endless(*args: Any, **kwargs: Any) -> Any:
            import ctypes

            marker.touch()
            libc = ctypes.CDLL(None)
            mutex = ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # held by ourselves: for ever

        setattr(owner, name, endless)

    return install


def test_an_impatient_second_term_does_not_lose_the_checkpoint(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    child = result.start("phase1", _at("spalf.training.graph", "train_step", 30, marker))
    _wait_for(marker)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        child.kill(number)
        time.sleep(0.02)
    outcome = child.wait()
    assert outcome.status == 75, outcome.errors
    assert (result.working("phase1") / "step_000000030" / "metadata.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_process_asked_to_stop_leaves_with_75(
    number: signal.Signals, reference: Run, fresh: Callable[[str], Run]
) -> None:
    result = fresh("phase1")
    command = [sys.executable, "-c", "from spalf.cli.main import main; main()"]
    command += [*result.arguments("phase1")[1:], "--runtime", '{"checkpoint_every_steps": 1}']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(result.working("phase1").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - asked < 10
    assert "Traceback" not in errors
    again = result.run("phase1")
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY["phase1"])


def test_a_second_process_says_who_holds_the_output(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    child = result.start("phase1", _slow_steps(marker))
    _wait_for(marker)
    second = result.run("phase1")
    assert second.status == 75
    assert f"process {child.pid} on {os.uname().nodename} since" in second.lines[-1]
    assert "--if-locked wait" in second.lines[-1]
    child.kill(signal.SIGKILL)
    child.wait()
    after = result.run("phase1")  # the lock went with the process
    assert after.status == 0, after.errors


def test_a_twin_that_waits_takes_the_finished_result(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    child = result.start("phase1", _at("spalf.training.graph", "train_step", 2, marker))
    _wait_for(marker)
    twin = result.start("phase1", _forbidden_to_train, "--if-locked", "wait")
    first, second = child.wait(), twin.wait()
    assert (first.status, second.status) == (0, 0), second.errors
    assert "is finished already" in second.errors
    assert_same(result, reference, MADE_BY["phase1"])


def test_a_waiting_twin_can_be_stopped(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    child = result.start("phase1", _slow_steps(marker))
    _wait_for(marker)
    log = tmp_path / "twin.err"
    from tests.faults.harness import start

    twin = start([*result.arguments("phase1"), "--if-locked", "wait"], log)
    while "waiting for it" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.02)
    twin.kill(signal.SIGTERM)
    assert twin.wait(timeout=10).status == 75
    child.kill(signal.SIGKILL)
    child.wait()


def test_checkpoints_are_limited_to_two_and_cost_little(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    child = result.start("phase1", _at("spalf.training.graph", "train_step", 45, marker))
    _wait_for(marker)
    names = sorted(path.name for path in result.working("phase1").glob("step_*"))
    child.wait()
    assert names == ["step_000000032", "step_000000040"]


@pytest.mark.parametrize(("minutes", "some"), [(1e-6, True), (1e6, False)])
def test_checkpoints_are_written_by_minutes_too(
    minutes: float, some: bool, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    runtime = json.dumps({"checkpoint_every_steps": None, "checkpoint_every_minutes": minutes})
    prepare = _at("spalf.training.graph", "train_step", 45, marker)
    child = result.start("phase1", prepare, "--runtime", runtime)
    _wait_for(marker)
    assert any(result.working("phase1").glob("step_*")) == some
    child.kill(signal.SIGKILL)
    child.wait()


def test_the_interval_in_minutes_stretches_where_a_checkpoint_takes_long() -> None:
    from spalf.steps.context import CheckpointClock

    clock = CheckpointClock(every_minutes=0.2 / 60, every_steps=None)
    time.sleep(0.25)
    assert clock.due(1)
    with clock.timed():
        time.sleep(0.05)
    time.sleep(0.3)
    assert not clock.due(2)  # 0.05 s are a hundredth of 5 s


def _slow_steps(marker: Path) -> Callable[[], None]:
    def install() -> None:
        from spalf.training import graph

        step = graph.train_step

        def slow(*args: Any) -> Any:
            marker.touch()
            time.sleep(0.5)
            return step(*args)

        graph.train_step = slow

    return install


def _forbidden_to_train() -> None:
    from spalf.training import graph

    def never(*_: Any) -> Any:
        raise AssertionError("the twin trained")

    graph.train_step = never


def _wait_for(marker: Path) -> None:
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
