"""Curves for TensorBoard and Weights & Biases: the metrics log's rows, each step once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from spalf.cli.runtime import set_up
from spalf.config import RunConfig, RuntimeConfig
from spalf.errors import UserError
from spalf.steps import trackers
from spalf.steps.initialise import initialise_step
from spalf.steps.train import phase1
from tests.helpers_planted import context, planted_config, write_calibration
from workflow import resources, steps

CONFIG = planted_config(
    60,
    runtime={
        "log_every_steps": 1,
        "device": "cpu",
        "checkpoint_every_minutes": 1e6,
        "checkpoint_every_steps": 10,
        "trackers": ["tensorboard"],
    },
)


class Killed(BaseException):
    """Ends a step as a kill does: nothing is saved on the way out."""


def killed_after(steps: int) -> Callable[[], bool]:
    calls = iter(range(steps))

    def should_stop() -> bool:
        if next(calls, None) is None:
            raise Killed
        return False

    return should_stop


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibration = write_calibration(CONFIG, tmp_path_factory.mktemp("trackers") / "calibration")
    initialise_step(CONFIG, calibration, calibration.with_name("init"), context())
    return calibration.with_name("init")


def train(
    init: Path, out: Path, config: RunConfig = CONFIG, kill_after: int | None = None
) -> list[dict[str, Any]]:
    """Phase 1 to its end, or until it is killed; the rows of its metrics log."""
    stop = killed_after(kill_after) if kill_after is not None else lambda: False
    calibration = init.with_name("calibration")
    if kill_after is not None:
        with pytest.raises(Killed):
            phase1(config, calibration, init, out, context(stop))
        return []
    phase1(config, calibration, init, out, context(stop))
    return rows(out / "metrics.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(directory: Path) -> Iterator[tuple[int, str, float]]:
    """Step, curve and value of everything in the event files of a directory."""
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                yield event.step, value.tag, float(make_ndarray(value.tensor))


def test_tensorboard_has_every_row_of_the_metrics_log(init: Path, tmp_path: Path) -> None:
    written = train(init, tmp_path / "phase1")
    assert len(written) > 30
    found = list(events(tmp_path / "tensorboard" / "phase1"))
    expected = [(r["step"], n, v) for r in written for n, v in trackers.curves(r).items()]
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    assert [f[2] for f in found] == pytest.approx([e[2] for e in expected], rel=1e-6)
    assert {"l0", "explained_variance", "lambda/faith", "g/drift"} <= {f[1] for f in found}


def test_a_killed_run_continues_its_curves_and_repeats_no_step(init: Path, tmp_path: Path) -> None:
    train(init, tmp_path / "phase1", kill_after=25)  # five steps beyond a checkpoint
    written = train(init, tmp_path / "phase1")
    directory = tmp_path / "tensorboard" / "phase1"
    assert len(list(directory.iterdir())) == 1
    l0 = [(step, value) for step, tag, value in events(directory) if tag == "l0"]
    assert [step for step, _ in l0] == [row["step"] for row in written]
    assert [value for _, value in l0] == pytest.approx([row["l0"] for row in written], rel=1e-6)


def test_without_trackers_nothing_is_written(init: Path, tmp_path: Path) -> None:
    quiet = CONFIG.model_copy(
        update={"runtime": CONFIG.runtime.model_copy(update={"trackers": ()})}
    )
    train(init, tmp_path / "phase1", quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"phase1", "phase1.checkpoints"}


def test_trackers_change_nothing_that_reruns_a_step() -> None:
    plain = planted_config(60)
    followed = plain.model_copy(
        update={"runtime": plain.runtime.model_copy(update={"trackers": ("tensorboard",)})}
    )
    for step in steps.FIELDS:
        assert steps.settings(step, plain) == steps.settings(step, followed)
    assert json.loads(resources.execution(followed))["trackers"] == ["tensorboard"]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    runtime = RuntimeConfig.model_validate({"device": "cpu", "trackers": ["tensorboard"]})
    with pytest.raises(
        UserError, match=r"runtime\.trackers = 'tensorboard': .*spalf\[tensorboard\]"
    ):
        set_up(runtime, seed=0)


class FakeWandB(SimpleNamespace):
    """Keeps what it is sent, by run, as the service would."""

    def __init__(self) -> None:
        super().__init__(runs={}, started=[], fault=None)
        self.errors = SimpleNamespace(
            CommError=type("CommError", (Exception,), {}),
            UsageError=type("UsageError", (Exception,), {}),
        )

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **given: Any) -> SimpleNamespace:
        if self.fault:
            raise self.fault
        self.started.append(given)
        sent = self.runs.setdefault(given["id"], [])
        return SimpleNamespace(
            url="somewhere",
            offline=False,
            log=lambda values, step: sent.append((step, values["l0"])),
            finish=lambda: None,
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return fake


def with_wandb(config: RunConfig = CONFIG, **changes: Any) -> RunConfig:
    runtime = config.runtime.model_copy(update={"trackers": ("wandb",)})
    return config.model_copy(update={"runtime": runtime, **changes})


def test_weights_and_biases_gets_each_step_once(
    init: Path, tmp_path: Path, wandb: FakeWandB
) -> None:
    out = tmp_path / "L0_4" / "seed_0" / "phase1"
    train(init, out, with_wandb(), kill_after=25)
    written = train(init, out, with_wandb())
    (sent,) = wandb.runs.values()  # both attempts are one run
    assert sent == [(row["step"], row["l0"]) for row in written]
    first, second = wandb.started
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["name"].endswith("L0_4/seed_0/phase1")
    assert first["config"]["lr"] == CONFIG.lr


def test_other_settings_are_another_run(init: Path, tmp_path: Path, wandb: FakeWandB) -> None:
    open_one = trackers.open_wandb
    first = open_one(tmp_path / "phase1", {"lr": 1.0})
    assert first is not None
    first.log({"step": 5, "l0": 1.0})
    again = open_one(tmp_path / "phase1", {"lr": 1.0})
    other = open_one(tmp_path / "phase1", {"lr": 2.0})
    assert again is not None and other is not None
    other.log({"step": 5, "l0": 2.0})
    assert [given["id"] for given in wandb.started[:2]] == [wandb.started[0]["id"]] * 2
    assert list(wandb.runs.values()) == [[(5, 1.0)], [(5, 2.0)]]


def test_a_log_begun_without_a_tracker_is_caught_up(
    init: Path, tmp_path: Path, wandb: FakeWandB
) -> None:
    runtime = CONFIG.runtime.model_copy(update={"trackers": ()})
    train(init, tmp_path / "phase1", CONFIG.model_copy(update={"runtime": runtime}), kill_after=25)
    written = train(init, tmp_path / "phase1", with_wandb())
    (sent,) = wandb.runs.values()
    assert [step for step, _ in sent] == [row["step"] for row in written]


def test_training_goes_on_where_the_service_cannot_be_reached(
    init: Path, tmp_path: Path, wandb: FakeWandB, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fault = wandb.errors.CommError("no route\nand more")
    assert train(init, tmp_path / "phase1", with_wandb())
    assert "cannot be reached (no route)" in caplog.text


def test_no_account_is_one_line(tmp_path: Path, wandb: FakeWandB) -> None:
    wandb.fault = wandb.errors.UsageError("No API key configured. Log in.\nand more")
    with pytest.raises(UserError, match=r"'wandb': No API key configured; run `wandb login`"):
        trackers.open_wandb(tmp_path / "phase1", {})


def test_the_real_package_takes_the_rows_offline(tmp_path: Path) -> None:
    """In a process of its own, which the package expects."""
    out = tmp_path / "L0_4" / "seed_0" / "phase1"
    code = (
        "import sys; from pathlib import Path; from spalf.steps.trackers import open_wandb\n"
        "run = open_wandb(Path(sys.argv[1]), {'lr': 1.0})\n"
        "run.log({'step': 10, 'l0': 4.0, 'lambda_faith': 2.0})\n"
        "run.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        env={**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (record,) = out.parent.glob("wandb/offline-run-*/run-*.wandb")
    assert b"lambda/faith" in record.read_bytes()
    assert json.loads((out.parent / "wandb" / "phase1.json").read_text())["step"] == 10
