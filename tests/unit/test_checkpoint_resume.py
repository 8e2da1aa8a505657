"""I10: save → load → continue equals continue, bit for bit, on a real state and a real run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spalf.activations import ActivationStore
from spalf.checkpoint import read_checkpoint, write_checkpoint
from spalf.config import RunConfig
from spalf.controller.controller import to_tensors
from spalf.errors import Interrupted, UserError
from spalf.steps.initialise import initialise_step
from spalf.steps.train import PROCEDURE, _fresh_state, phase1, phase2
from spalf.training.loop import Hooks, run_phase
from spalf.training.phase import Phase, enter_phase_two, phase_one, phase_two
from spalf.training.state import TrainState, from_checkpoint, load_sae, to_checkpoint
from tests.helpers_planted import (
    PlantedContext,
    PlantedModel,
    context,
    planted_config,
    stream,
    write_calibration,
)

CPU = torch.device("cpu")
CONFIG = planted_config(120)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(CONFIG, tmp_path_factory.mktemp("resume") / "calibration")


@pytest.fixture(scope="module")
def init(calibration: Path) -> Path:
    initialise_step(CONFIG, calibration, calibration.with_name("init"), context())
    return calibration.with_name("init")


def silent(stop: Callable[[], bool] = lambda: False) -> Hooks:
    return Hooks(lambda row: None, lambda state: None, lambda step: False, stop)


def advance(state: TrainState, phase: Phase, config: RunConfig, steps: int) -> TrainState:
    short = dataclasses.replace(phase, last_step=state.step + steps, may_converge=False)
    run_phase(state, short, config, silent())
    return state


def assert_equal(one: TrainState, two: TrainState) -> None:
    """Weights, moments, controller and counters, bit for bit."""
    for name, value in one.sae.state_dict().items():
        assert torch.equal(value, two.sae.state_dict()[name]), name
    moments, others = (state.optimizer.state_dict()["state"] for state in (one, two))
    assert moments.keys() == others.keys()
    groups = [s.optimizer.param_groups[0] for s in (one, two)]
    assert groups[0]["betas"] == groups[1]["betas"]
    for key, slots in moments.items():
        for name, value in slots.items():
            assert torch.equal(value, others[key][name]), (key, name)
    for name, value in to_tensors(one.controller).items():
        assert torch.equal(value, to_tensors(two.controller)[name]), name
    assert torch.equal(one.stale, two.stale)
    assert torch.equal(one.exchange_rate.nan_to_num(-1), two.exchange_rate.nan_to_num(-1))
    averages = [state.average.tensors() if state.average else {} for state in (one, two)]
    assert averages[0].keys() == averages[1].keys()
    for name, value in averages[0].items():
        assert torch.equal(value, averages[1][name]), f"mean of {name}"
    for name in ("step", "phase", "phase1_end", "cooldown_start", "ended_by", "history", "derived"):
        assert getattr(one, name) == getattr(two, name), name


@pytest.mark.parametrize("number", [1, 2])
def test_i10_continuing_a_loaded_state_equals_continuing(
    init: Path, tmp_path: Path, number: int
) -> None:
    store = ActivationStore(PlantedModel(), stream(4096, 0))
    state = _fresh_state(CONFIG, init, CPU)
    phase = phase_one(CONFIG, store, state.sae)
    advance(state, phase, CONFIG, 37)
    state.history.append((37, 0.1 + 0.2, -1 / 3))
    if number == 2:
        enter_phase_two(state, CONFIG, store)
        phase = phase_two(CONFIG, store, state.sae, state.phase1_end)
        advance(state, phase, CONFIG, 11)
        assert state.average is not None, "the second half is under way"
    state.stale += torch.arange(CONFIG.F)
    write_checkpoint(tmp_path / "c", to_checkpoint(state, {"note": "mid-way"}))
    loaded = from_checkpoint(read_checkpoint(tmp_path / "c"), CONFIG, CPU)
    assert_equal(state, loaded)
    torch.manual_seed(12345)
    torch.rand(17)
    advance(loaded, phase, CONFIG, 70)
    advance(state, phase, CONFIG, 70)
    assert_equal(state, loaded)


def run(config: RunConfig, calibration: Path, init: Path, base: Path, made: PlantedContext) -> None:
    phase1(config, calibration, init, base / "phase1", made)
    phase2(config, calibration, base / "phase1", base / "phase2", made)


def stop_after(steps: int) -> Callable[[], bool]:
    """A request to stop that arrives at the given time of asking, about once a step."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return should_stop


def assert_same_result(one: Path, two: Path) -> None:
    for step in ("phase1", "phase2"):
        for stem in ("model", "tensors", "control", "optimizer"):
            name = f"{step}/{stem}.safetensors"
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
        log = f"{step}/metrics.jsonl"
        assert (one / log).read_text() == (two / log).read_text()
        states = [read_checkpoint(path / step).metadata["state"] for path in (one, two)]
        assert states[0] == states[1]


def test_i10_a_run_interrupted_every_few_steps_ends_like_one_that_was_not(
    calibration: Path, init: Path, tmp_path: Path
) -> None:
    run(CONFIG, calibration, init, tmp_path / "straight", context())
    interruptions = []
    for attempt in range(20):
        try:
            run(CONFIG, calibration, init, tmp_path / "cut", context(stop_after(13 + 3 * attempt)))
            break
        except Interrupted as stopped:
            interruptions.append(stopped.step)
    assert len(set(interruptions)) > 3
    assert interruptions == sorted(interruptions)
    assert 0 < interruptions[0] <= 13
    assert_same_result(tmp_path / "straight", tmp_path / "cut")


def test_i10_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(
    calibration: Path, init: Path, tmp_path: Path
) -> None:
    every = CONFIG.runtime.model_copy(update={"checkpoint_every_steps": 10})
    config = CONFIG.model_copy(update={"runtime": every})
    run(config, calibration, init, tmp_path / "straight", context())
    with pytest.raises(Interrupted):
        run(config, calibration, init, tmp_path / "cut", context(stop_after(35)))
    newest = max((tmp_path / "cut" / "phase1.checkpoints").glob("step_*"))
    (newest / "model.safetensors").write_bytes(b"torn")
    run(config, calibration, init, tmp_path / "cut", context())
    assert_same_result(tmp_path / "straight", tmp_path / "cut")


def test_runtime_settings_do_not_invalidate_a_checkpoint_but_others_do(
    calibration: Path, init: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted) as first:
        run(CONFIG, calibration, init, tmp_path / "a", context(stop_after(20)))
    assert first.value.step > 10
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    faster = CONFIG.runtime.model_copy(update={"threads": 1, "checkpoint_every_steps": 7})
    same_run = CONFIG.model_copy(update={"runtime": faster})
    with pytest.raises(Interrupted) as resumed:
        run(same_run, calibration, init, tmp_path / "a", context(stop_after(4)))
    assert resumed.value.step >= first.value.step
    other = CONFIG.model_copy(update={"lr": 2e-2})
    with pytest.raises(UserError, match=r"another run: lr \(0\.01 there, 0\.02 here\)"):
        run(other, calibration, init, tmp_path / "b", context())
    anew = dataclasses.replace(context(stop_after(4)), if_foreign="restart")
    with pytest.raises(Interrupted) as started:
        run(other, calibration, init, tmp_path / "b", anew)
    assert started.value.step < 5


def test_an_initialisation_of_another_cell_is_refused(
    calibration: Path, init: Path, tmp_path: Path
) -> None:
    other = CONFIG.model_copy(update={"L0_target": 5.0})
    with pytest.raises(UserError, match=r"another configuration: L0_target \(4\.0 there, 5\.0"):
        phase1(other, calibration, init, tmp_path / "phase1", context())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_size_is_refused(init: Path) -> None:
    other = CONFIG.model_copy(update={"F": 128})
    with pytest.raises(UserError, match="the checkpoint has F = 64"):
        load_sae(read_checkpoint(init), other, CPU)


def test_a_finished_phase_is_not_run_again(calibration: Path, init: Path, tmp_path: Path) -> None:
    run(CONFIG, calibration, init, tmp_path, context())
    before = (tmp_path / "phase1" / "metadata.json").stat().st_mtime_ns
    run(CONFIG, calibration, init, tmp_path, context(lambda: True))
    assert (tmp_path / "phase1" / "metadata.json").stat().st_mtime_ns == before


def test_what_an_earlier_procedure_trained_is_not_taken_for_what_this_one_would(
    calibration: Path, init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "phase1"
    monkeypatch.setattr("spalf.steps.train.PROCEDURE", 1)
    phase1(CONFIG, calibration, init, out, context())
    before = (out / "metadata.json").stat().st_mtime_ns
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"procedure \(1 there, {PROCEDURE} here\)"):
        phase1(CONFIG, calibration, init, out, context())
    anew = dataclasses.replace(context(), if_foreign="restart")
    phase1(CONFIG, calibration, init, out, anew)
    assert (out / "metadata.json").stat().st_mtime_ns != before


def test_training_is_made_anew_where_its_ramp_starts_elsewhere_and_only_there(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, out = tmp_path / "init", tmp_path / "phase1"
    anew = dataclasses.replace(context(), if_foreign="restart")

    def trained_at() -> int:
        initialise_step(CONFIG, calibration, init, anew)
        phase1(CONFIG, calibration, init, out, anew)
        return (out / "metadata.json").stat().st_mtime_ns

    first = trained_at()
    shutil.rmtree(init)
    assert trained_at() == first, "initialised again to the same bits"
    monkeypatch.setattr("spalf.steps.initialise.first_l0", lambda *_: 2 * CONFIG.L0_target)
    assert trained_at() != first
