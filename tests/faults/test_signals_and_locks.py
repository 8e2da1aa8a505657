"""Asked to stop, a step saves and leaves with status 75; two processes never share an output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MADE_BY, STEPS, Run, assert_no_litter, assert_same
from tests.faults.harness import start


def _owner(place: str) -> Any:
    """The module, or the class in ``module:class``, whose function is replaced."""
    import importlib

    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def _at(place: str, name: str, count: int, marker: Path, until: Path) -> Callable[[], None]:
    """Make the ``count``-th call of a function say so in ``marker``, and wait for ``until``.

    Args:
        place: module, or ``module:class``, of the function.
        name: of the function.
        count: which of its calls.
        marker: file made then.
        until: file to wait for.
    """

    def install() -> None:
        owner, calls = _owner(place), [0]
        function = getattr(owner, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                marker.touch()
                _wait_for(until)
            return function(*args, **kwargs)

        setattr(owner, name, held)

    return install


RESUMING = {
    "token": "resuming tokenisation after",
    "sequence": "resuming calibration at sequence {}",
    "step": " at step {}",
    "batch": "resuming evaluation after {} batches",
}
"""What the next process says, by the unit in which the stopped one counted its work."""
PHASE_ONE_STEPS = 51

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
    ("baseline", "sae_lens:SAETrainer", "step", 41),
    ("baseline", "spalf.activations:ActivationStore", "_read", 6),
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
    result, marker, asked = fresh(step), tmp_path / "there", tmp_path / "asked"
    child = result.start(step, _at(module, name, count, marker, asked))
    _wait_for(marker)
    child.kill(number)
    asked.touch()
    outcome = child.wait()
    assert outcome.status == 75, outcome.errors
    said = re.search(r"stopped after (\w+) (\d+); run the same command again", outcome.lines[-1])
    assert said, outcome.errors
    assert not (result.output(step) / "metadata.json").exists()
    assert not (result.directory / "evaluation.json").exists()
    assert_no_litter(result)
    again = result.run(step)
    assert again.status == 0, again.errors
    if int(said[2]) > PHASE_ONE_STEPS * (step == "phase2"):  # it goes on exactly there
        assert RESUMING[said[1]].format(said[2]) in again.errors
    assert_same(result, reference, MADE_BY[step])


LONG_CALLS = [
    ("calibrate", "spalf.steps.context", "load_model"),
    ("calibrate", "spalf.steps.tokens", "load_tokenizer"),
    ("calibrate", "spalf.steps.calibrate:SoftZCA", "fit"),
    ("init", "spalf.steps.initialise", "initialise"),
    ("phase1", "spalf.steps.train", "load_calibration"),
    ("phase2", "spalf.steps.context", "load_model"),
    ("evaluate", "spalf.evaluation:AbsorptionMeasurement", "result"),
    ("baseline", "spalf.steps.baseline", "load_calibration"),
    ("baseline", "spalf.baselines.train", "score"),
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
    outcome = child.wait()
    assert outcome.status == 75, outcome.errors
    assert "run the same command again to continue" in outcome.lines[-1]
    assert not (result.output(step) / "metadata.json").exists()
    again = result.run(step)
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY[step])
    assert_no_litter(result)


def _never_ending(place: str, name: str, marker: Path) -> Callable[[], None]:
    """Replace a function by a call into C that no handler of Python's can interrupt."""

    def install() -> None:
        def endless(*args: Any, **kwargs: Any) -> Any:
            import ctypes

            marker.touch()
            libc = ctypes.CDLL(None)
            mutex = ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # held by ourselves: for ever

        setattr(_owner(place), name, endless)

    return install


def test_an_impatient_second_term_does_not_lose_the_checkpoint(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker, asked = fresh("phase1"), tmp_path / "there", tmp_path / "asked"
    prepare = _at("spalf.training.graph", "train_step", 30, marker, asked)
    child = result.start("phase1", prepare)
    _wait_for(marker)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        child.kill(number)
        time.sleep(0.02)
    asked.touch()
    outcome = child.wait()
    assert outcome.status == 75, outcome.errors
    assert (result.working("phase1") / "step_000000030" / "metadata.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_process_asked_to_stop_leaves_with_75(
    number: signal.Signals, reference: Run, fresh: Callable[[str], Run]
) -> None:
    """At once: without taking Python and torch apart, which takes seconds on a busy machine."""
    result = fresh("phase1")
    program = (
        "import atexit, os; from spalf.cli.main import main;"
        "atexit.register(os.write, 2, b'taken apart'); main()"
    )
    command = [sys.executable, "-c", program]
    command += [*result.arguments("phase1")[1:], "--runtime", '{"checkpoint_every_steps": 1}']
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        _wait_until(lambda: list(result.working("phase1").glob("step_*")))
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "taken apart" not in errors
    assert "Traceback" not in errors
    assert "run the same command again to continue" in errors.splitlines()[-1]
    again = result.run("phase1")
    assert again.status == 0, again.errors
    assert_same(result, reference, MADE_BY["phase1"])


WORK = {
    "calibrate": ("spalf.data.pack:_Packer", "add"),
    "init": ("spalf.steps.initialise", "initialise"),
    "phase1": ("spalf.training.graph", "train_step"),
    "phase2": ("spalf.training.graph", "train_step"),
    "evaluate": ("spalf.evaluation:DownstreamMeasurement", "add"),
    "baseline": ("sae_lens:SAETrainer", "step"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_second_process_says_who_holds_the_output(
    step: str, reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh(step), tmp_path / "there"
    child = result.start(step, _at(*WORK[step], 1, marker, tmp_path / "never"))
    _wait_for(marker)
    second = result.run(step)
    assert second.status == 75
    assert f"process {child.pid} on {os.uname().nodename} since" in second.lines[-1]
    assert "--if-locked wait" in second.lines[-1]
    child.kill(signal.SIGKILL)
    child.wait()
    after = result.run(step)  # the lock went with the process
    assert after.status == 0, after.errors
    assert_same(result, reference, MADE_BY[step])


@pytest.mark.parametrize("step", STEPS)
def test_a_twin_that_waits_takes_the_finished_result(
    step: str, reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh(step), tmp_path / "there"
    go_on = tmp_path / "go_on"
    child = result.start(step, _at(*WORK[step], 1, marker, go_on))
    _wait_for(marker)
    log = tmp_path / "twin.err"
    twin = start([*result.arguments(step), "--if-locked", "wait"], log, _forbidden(*WORK[step]))
    _wait_until(lambda: log.exists() and "waiting for it" in log.read_text())
    go_on.touch()
    first, second = child.wait(), twin.wait()
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert "is finished already" in second.errors
    assert_same(result, reference, MADE_BY[step])


def test_a_waiting_twin_can_be_stopped(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    child = result.start("phase1", _at(*WORK["phase1"], 1, marker, tmp_path / "never"))
    _wait_for(marker)
    log = tmp_path / "twin.err"
    twin = start([*result.arguments("phase1"), "--if-locked", "wait"], log)
    _wait_until(lambda: log.exists() and "waiting for it" in log.read_text())
    twin.kill(signal.SIGTERM)
    assert twin.wait().status == 75
    child.kill(signal.SIGKILL)
    child.wait()


def test_the_last_two_checkpoints_are_kept(
    reference: Run, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    prepare = _at("spalf.training.graph", "train_step", 45, marker, tmp_path / "never")
    child = result.start("phase1", prepare)
    _wait_for(marker)
    names = sorted(path.name for path in result.working("phase1").glob("step_*"))
    child.kill(signal.SIGKILL)
    child.wait()
    assert names == ["step_000000032", "step_000000040"]


@pytest.mark.parametrize(("minutes", "some"), [(1e-6, True), (1e6, False)])
def test_checkpoints_are_written_by_minutes_too(
    minutes: float, some: bool, fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    result, marker = fresh("phase1"), tmp_path / "there"
    runtime = json.dumps({"checkpoint_every_steps": None, "checkpoint_every_minutes": minutes})
    prepare = _at("spalf.training.graph", "train_step", 45, marker, tmp_path / "never")
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


def _forbidden(place: str, name: str) -> Callable[[], None]:
    def install() -> None:
        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("the twin did the work")

        setattr(_owner(place), name, never)

    return install


def _wait_for(marker: Path) -> None:
    _wait_until(marker.exists)


def _wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
