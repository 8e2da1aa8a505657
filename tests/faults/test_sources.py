"""A name on the hub stands for what it was when a run first read it; files, for their contents."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.conftest import COMPARED, Run, assert_same, small_config
from tests.faults.harness import Outcome, in_child

A, B = "a" * 40, "b" * 40
MODEL = "some/model"
STEPS = ("calibrate", "init", "phase1")


class Hub:
    """The cache of a hub client on this machine: two commits of one model, and where main is."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repository = home / "hub" / "models--some--model"
        (self.repository / "refs").mkdir(parents=True)
        for commit in (A, B):
            self._add(commit)
        self.point("main", A)

    def _add(self, commit: str) -> None:
        from spalf.models import resolve_model

        snapshot = self.repository / "snapshots" / commit
        shutil.copytree(resolve_model("spalf/demo-2l"), snapshot)
        if commit == B:
            in_child(lambda: _scale_weights(snapshot / "model.safetensors"))

    def point(self, revision: str, commit: str) -> None:
        (self.repository / "refs" / revision).write_text(commit)

    def install(self) -> None:
        """Make a child's hub client use this cache."""
        from huggingface_hub import constants
        from transformers.utils import hub

        constants.HF_HUB_CACHE = str(self.home / "hub")
        if hasattr(hub, "TRANSFORMERS_CACHE"):
            hub.TRANSFORMERS_CACHE = str(self.home / "hub")


def _scale_weights(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: value * 1.01 for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "home")


@pytest.fixture
def configured(tmp_path: Path, corpus: Path) -> Callable[..., Run]:
    def make(**changes: Any) -> Run:
        config = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        content = small_config(corpus, **{"model_name": MODEL, **changes})
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        return Run(tmp_path / "run", config)

    return make


def _do(run: Run, hub: Hub, *steps: str) -> None:
    for step in steps:
        outcome = run.run(step, hub.install)
        assert outcome.status == 0, (step, outcome.errors)


def _refused(outcome: Outcome, *fields: str) -> None:
    assert outcome.status == 2, outcome.errors
    assert "Traceback" not in outcome.errors
    for field in fields:
        assert field in outcome.lines[-1], outcome.lines[-1]


def _sources(run: Run) -> dict[str, Any]:
    metadata = json.loads((run.output("calibrate") / "metadata.json").read_text())
    return dict(metadata["sources"])


def test_an_updated_model_is_not_mixed_with_the_one_calibrated_on(
    hub: Hub, configured: Callable[..., Run], reference: Run
) -> None:
    run = configured()
    _do(run, hub, *STEPS)
    assert _sources(run)["commit"] == A and _sources(run)["model"] == A
    hub.point("main", B)
    _do(run, hub, "phase2", "evaluate")
    assert_same(run, reference, COMPARED[:4])  # commit A is the bundled model
    # The calibration itself, asked for again, is still the finished one.
    outcome = run.run("calibrate", hub.install)
    assert outcome.status == 0 and "is finished already" in outcome.errors


def test_a_calibration_continued_after_the_hub_has_moved_keeps_to_its_commit(
    hub: Hub, configured: Callable[..., Run], reference: Run
) -> None:
    def killed() -> None:
        import signal

        from spalf.whitening import SplitHalfCovariance

        hub.install()
        update, calls = SplitHalfCovariance.update, [0]

        def counted(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            update(*args)

        SplitHalfCovariance.update = counted  # type: ignore[method-assign]

    run = configured()
    assert run.run("calibrate", killed).status == -9
    hub.point("main", B)
    outcome = run.run("calibrate", hub.install)
    assert outcome.status == 0, outcome.errors
    assert "resuming calibration" in outcome.errors
    assert _sources(run)["commit"] == A
    assert_same(run, reference, ("calibration/calibration.safetensors",))


def test_another_commit_asked_for_is_refused_with_both(
    hub: Hub, configured: Callable[..., Run]
) -> None:
    _do(configured(), hub, "calibrate", "init")
    for revision in (B, "next"):
        hub.point("next", B)
        outcome = configured(revision=revision).run("phase1", hub.install)
        _refused(outcome, f"input.model ('{A[:19]} there, '{B[:19]} here)", "revision (None there")
    outcome = configured(revision=B).run("calibrate", hub.install)
    _refused(outcome, "input.model")


def test_a_checkpoint_of_another_commit_is_refused_and_can_be_set_aside(
    hub: Hub, configured: Callable[..., Run]
) -> None:
    run = configured()
    _do(run, hub, "calibrate", "init")
    outcome = run.run("phase1", _killed_in_phase_one(hub))
    assert outcome.status == -9, outcome.errors
    hub.point("main", B)
    for step in ("calibrate", "init"):  # calibrated anew: at the commit that is current now
        run.forget(step)
        _do(run, hub, step)
    assert _sources(run)["commit"] == B
    before = sorted(run.working("phase1").glob("step_*"))
    _refused(run.run("phase1", hub.install), "input.model", A[:19], B[:19])
    assert sorted(run.working("phase1").glob("step_*")) == before
    outcome = run.run("phase1", hub.install, "--if-foreign", "restart")
    assert outcome.status == 0 and "setting aside" in outcome.errors, outcome.errors


def _killed_in_phase_one(hub: Hub) -> Callable[[], None]:
    def install() -> None:
        import signal

        from spalf.training import graph

        hub.install()
        step = graph.train_step

        def counted(state: Any, *args: Any) -> Any:
            if state.step == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(state, *args)

        graph.train_step = counted

    return install


def test_a_commit_that_is_gone_is_one_line(hub: Hub, configured: Callable[..., Run]) -> None:
    run = configured()
    _do(run, hub, "calibrate", "init")
    shutil.rmtree(hub.repository / "snapshots" / A)
    _refused(run.run("phase1", hub.install), f"model_name = '{MODEL}'", "cannot be fetched")


def test_the_hub_is_asked_where_it_can_be_reached(
    hub: Hub, configured: Callable[..., Run], tmp_path: Path
) -> None:
    """With a hub that answers; the dataset's commit is what its rows are read from."""
    asked = tmp_path / "asked"

    def online() -> None:
        from types import SimpleNamespace

        import datasets
        import huggingface_hub

        import spalf.hub
        from spalf.data import sources

        hub.install()
        spalf.hub.hub_reachable = sources.hub_reachable = lambda: True  # type: ignore[assignment]

        def repo_info(_: Any, repo: str, *, repo_type: str, **__: Any) -> Any:
            return SimpleNamespace(sha={"model": B, "dataset": "d" * 40}[repo_type])

        def load_dataset(path: str, *, revision: str, **__: Any) -> Any:
            asked.write_text(f"{path} {revision}")
            return [{"text": f"row {i} of the hub's\n\n" * 20} for i in range(2000)]

        huggingface_hub.HfApi.repo_info = repo_info  # type: ignore[method-assign]
        datasets.load_dataset = load_dataset

    run = configured(dataset="some/text")
    outcome = run.run("calibrate", online)
    assert outcome.status == 0, outcome.errors
    assert _sources(run)["commit"] == B and _sources(run)["dataset"] == "d" * 40
    assert asked.read_text() == f"some/text {'d' * 40}"
    tokens = json.loads((run.output("calibrate") / "tokens" / "tokens.json").read_text())
    assert tokens["dataset"]["revision"] == "d" * 40
    # From here on nobody needs to be asked.
    _do(run, hub, "init")
    outcome = configured(dataset={"path": "some/text", "revision": "e" * 40}).run(
        "phase1", hub.install
    )
    _refused(outcome, "dataset.revision", "input.dataset")


@pytest.mark.parametrize("where", ["the middle of the weights", "the tokenizer"])
def test_a_change_of_a_model_on_disk_is_found(
    where: str, configured: Callable[..., Run], tmp_path: Path
) -> None:
    from spalf.models import resolve_model

    model = tmp_path / "model"
    shutil.copytree(resolve_model("spalf/demo-2l"), model)
    run = configured(model_name=str(model))
    assert run.run("calibrate").status == 0
    name = "model.safetensors" if "weights" in where else "tokenizer.json"
    assert set(_sources(run)["files"]) >= {"config.json", name}
    data = bytearray((model / name).read_bytes())
    data[len(data) // 2] ^= 1
    (model / name).write_bytes(bytes(data))
    _refused(run.run("init"), "input.model")


def test_a_copy_of_a_model_with_new_times_is_the_same_model(
    configured: Callable[..., Run], tmp_path: Path
) -> None:
    from spalf.models import resolve_model

    model = tmp_path / "model"
    shutil.copytree(resolve_model("spalf/demo-2l"), model)
    run = configured(model_name=str(model))
    assert run.run("calibrate").status == 0
    for path in model.iterdir():
        os.utime(path, ns=(1, 1))
    (model / "README.md").write_text("which nothing reads")
    outcome = run.run("init")
    assert outcome.status == 0, outcome.errors


def test_as_real_processes(hub: Hub, configured: Callable[..., Run], reference: Run) -> None:
    run = configured()
    config = yaml.safe_load(run.config.read_text()) | {"output_dir": str(run.directory)}
    run.config.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "HF_HOME": str(hub.home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from spalf.cli.run import train; train()", str(run.config)]

    def train() -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    train()
    assert _sources(run)["commit"] == A
    hub.point("main", B)
    for step in ("phase2", "evaluate"):
        run.forget(step)
    train()
    assert_same(run, reference, COMPARED[:4])
