"""SIGKILL at every kind of moment: the run goes on, and its results are the same to the bit."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MADE_BY, Run, assert_no_litter, assert_same
from tests.faults.harness import Events

KILLS = int(os.environ.get("SPALF_FAULT_KILLS", "50"))
"""Kills in all; ``make soak`` asks for 500."""

PER_CHAIN = 6
"""Kills of one run, one after the other, before it is left to finish."""

AS_IN_A_WORKFLOW = ("--if-locked", "wait", "--if-foreign", "restart")

SHARES = {"calibrate": 0.2, "phase1": 0.3, "phase2": 0.2, "evaluate": 0.2, "baseline": 0.1}


def _chains(kills: float, per_chain: int) -> list[tuple[str, int]]:
    return [
        (step, chain)
        for step, share in SHARES.items()
        for chain in range(math.ceil(kills * share / per_chain))
    ]


def _installed(kill_at: int | None, counter: Path) -> Callable[[], None]:
    return lambda: Events(kill_at, counter).install()


@pytest.mark.parametrize(("step", "chain"), _chains(0.8 * KILLS, PER_CHAIN))
def test_i10_killed_and_continued_is_bit_identical(
    step: str,
    chain: int,
    reference: Run,
    fresh: Callable[[str], Run],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    result, counter = fresh(step), tmp_path / "events"
    choose = random.Random(f"{step} {chain}")
    whole = _events_of(step, reference, fresh, tmp_path)
    more = AS_IN_A_WORKFLOW if chain % 2 else ()
    kills = 0
    while kills < PER_CHAIN:
        outcome = result.run(step, _installed(choose.randint(1, whole), counter), *more)
        if outcome.status == 0:  # it had got too far to be killed there; another run is
            assert_same(result, reference, MADE_BY[step])
            result.forget(step)
            continue
        assert outcome.status == -signal.SIGKILL, outcome.errors
        kills += 1
    outcome = result.run(step, None, *more)
    assert outcome.status == 0, outcome.errors
    assert_same(result, reference, MADE_BY[step])
    assert_no_litter(result)
    record_property("kills", kills)


@pytest.mark.parametrize(("step", "chain"), _chains(0.2 * KILLS, 2))
def test_i10_killed_at_any_time_it_is_bit_identical(
    step: str,
    chain: int,
    reference: Run,
    fresh: Callable[[str], Run],
    record_property: Callable[[str, object], None],
) -> None:
    """From outside, at moments that nothing in the process knows of."""
    result, choose, kills = fresh(step), random.Random(f"time {step} {chain}"), 0
    seconds = _seconds_of(step, reference)
    while kills < 2:
        child = result.start(step)
        time.sleep(choose.uniform(0, seconds))
        child.kill(signal.SIGKILL)  # of one that ended it has no effect until it is waited for
        outcome = child.wait()
        if outcome.status == 0:
            assert_same(result, reference, MADE_BY[step])
            result.forget(step)
            continue
        assert outcome.status == -signal.SIGKILL, outcome.errors
        kills += 1
    outcome = result.run(step)
    assert outcome.status == 0, outcome.errors
    assert_same(result, reference, MADE_BY[step])
    assert_no_litter(result)
    record_property("kills", kills)


_SECONDS: dict[str, float] = {}


def _seconds_of(step: str, reference: Run) -> float:
    """How long an undisturbed run of ``step`` takes."""
    if step not in _SECONDS:
        whole = Run(reference.directory.with_name("timed"), reference.config)
        shutil.copytree(reference.directory, whole.directory)
        whole.forget(step)
        started = time.monotonic()
        assert whole.run(step).status == 0
        _SECONDS[step] = time.monotonic() - started
        shutil.rmtree(whole.directory)
    return _SECONDS[step]


_COUNTS: dict[str, int] = {}


def _events_of(step: str, reference: Run, fresh: Callable[[str], Run], tmp_path: Path) -> int:
    """Events of an undisturbed run of ``step``."""
    if step not in _COUNTS:
        counter = tmp_path / "count"
        result = Run(tmp_path / "whole", reference.config)
        shutil.copytree(reference.directory, result.directory)
        result.forget(step)
        outcome = result.run(step, _installed(None, counter))
        assert outcome.status == 0, outcome.errors
        _COUNTS[step] = int(counter.read_text())
    return _COUNTS[step]


def _counting(counter: Path, kill_at: int | None, *places: str) -> Callable[[], None]:
    """Count the calls of functions in a file, and die before the ``kill_at``-th of all."""

    def install() -> None:
        import importlib

        from spalf.data import pack

        pack._BATCH_CHARACTERS = 2**15
        calls = [0]

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                counter.write_text(str(calls[0]))
                return function(*args, **kwargs)

            return call

        for place in places:
            module, owner, name = place.split(":")
            holder = getattr(importlib.import_module(module), owner)
            setattr(holder, name, counted(getattr(holder, name)))

    return install


TOKENISING = ("spalf.data.pack:_Packer:add",)
EVALUATING = (
    "spalf.evaluation:DownstreamMeasurement:add",
    "spalf.evaluation:AbsorptionMeasurement:add",
    "spalf.evaluation:ProbingMeasurement:add",
)


@pytest.mark.parametrize("share", [0.15, 0.4, 0.7, 0.95])
@pytest.mark.parametrize(
    ("step", "places", "said"),
    [
        ("calibrate", TOKENISING, "resuming tokenisation after"),
        ("evaluate", EVALUATING, "resuming evaluation after"),
    ],
)
def test_i10_work_inside_a_step_is_repeated_by_a_checkpoint_interval_at_most(
    step: str,
    places: tuple[str, ...],
    said: str,
    share: float,
    reference: Run,
    fresh: Callable[[str], Run],
    tmp_path: Path,
) -> None:
    """`checkpoint_every_steps` is 8, and the batches of both are counted."""
    whole = _calls_of(step, places, fresh, tmp_path)
    result, counter = fresh(step), tmp_path / "calls"
    kill_at = round(share * whole)
    outcome = result.run(step, _counting(counter, kill_at, *places))
    assert outcome.status == -signal.SIGKILL, outcome.errors
    assert int(counter.read_text()) == kill_at - 1
    again = result.run(step, _counting(counter, None, *places))
    assert again.status == 0, again.errors
    assert kill_at <= 8 or said in again.errors
    assert int(counter.read_text()) + kill_at - 1 - whole < 8
    assert_same(result, reference, MADE_BY[step])


def _calls_of(
    step: str, places: tuple[str, ...], fresh: Callable[[str], Run], tmp_path: Path
) -> int:
    result, counter = fresh(step), tmp_path / "whole"
    outcome = result.run(step, _counting(counter, None, *places))
    assert outcome.status == 0, outcome.errors
    shutil.rmtree(result.directory)
    count = int(counter.read_text())
    assert count > 16
    return count
