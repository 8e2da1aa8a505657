"""A small run of every step, done once without disturbance, that the faults are compared with."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.harness import Child, Outcome, start

STEPS = ("calibrate", "init", "phase1", "phase2", "evaluate", "baseline")
COMPARED = (
    "phase1/model.safetensors",
    "phase1/metrics.jsonl",
    "phase2/model.safetensors",
    "phase2/metrics.jsonl",
    "evaluation.json",
)
"""Files that must be the same byte for byte, however often the run was killed."""
TRAINED = ("model", "tensors", "control", "optimizer")
MADE_BY = {
    "calibrate": (
        "calibration/calibration.safetensors",
        *(f"calibration/tokens/{name}.npy" for name in ("train", "calibration", "evaluation")),
    ),
    "init": ("init/model.safetensors", "init/tensors.safetensors"),
    "phase1": (*(f"phase1/{name}.safetensors" for name in TRAINED), "phase1/metrics.jsonl"),
    "phase2": (*(f"phase2/{name}.safetensors" for name in TRAINED), "phase2/metrics.jsonl"),
    "evaluate": ("evaluation.json",),
    "baseline": ("baseline/sae_weights.safetensors", "baseline/cfg.json"),
}
"""The same, by the step that makes them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked children must not inherit thread pools."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    _import_what_the_steps_need()
    yield
    os.environ.clear()
    os.environ.update(before)


def _import_what_the_steps_need() -> None:
    import datasets  # noqa: F401
    import sae_lens
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import spalf.cli.runtime
    import spalf.steps.baseline
    import spalf.steps.pipeline
    import spalf.steps.sanity  # noqa: F401

    assert AutoModelForCausalLM and GPTNeoXForCausalLM and PreTrainedTokenizerFast
    assert sae_lens.SAETrainer
    get_checkpoint_conversion_mapping("gpt_neox")  # makes a table that every model needs


@dataclass
class Run:
    """A directory in which the steps of one small run are carried out."""

    directory: Path
    config: Path
    logs: Path | None = None

    def arguments(self, step: str) -> list[str]:
        at = {name: str(self.directory / name) for name in STEPS}
        at["calibration"] = str(self.directory / "calibration")
        given = ["spalf", step, "--config", str(self.config)]
        if step == "calibrate":
            return [*given, "--out", at["calibration"]]
        given += ["--calibration", at["calibration"]]
        if step == "baseline":
            return [*given, "--method", "batchtopk", "--out", at["baseline"]]
        if step == "init":
            return [*given, "--out", at["init"]]
        if step == "phase1":
            return [*given, "--init", at["init"], "--out", at["phase1"]]
        given += ["--phase1", at["phase1"]]
        if step == "phase2":
            return [*given, "--out", at["phase2"]]
        report = str(self.directory / "evaluation.json")
        return [*given, "--phase2", at["phase2"], "--out", report]

    def output(self, step: str) -> Path:
        name = {"calibrate": "calibration", "evaluate": "evaluation.json"}.get(step, step)
        return self.directory / name

    def working(self, step: str) -> Path:
        return self.directory / f"{self.output(step).stem}.checkpoints"

    def start(self, step: str, prepare: Callable[[], None] | None = None, *more: str) -> Child:
        log = (self.logs or self.directory.parent) / f"{self.directory.name}.{step}.err"
        return start([*self.arguments(step), *more], log, prepare)

    def run(self, step: str, prepare: Callable[[], None] | None = None, *more: str) -> Outcome:
        return self.start(step, prepare, *more).wait()

    def forget(self, step: str) -> None:
        """Remove a step's output and checkpoints."""
        for path in (self.output(step), self.working(step)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def small_config(corpus: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name": "spalf/demo-2l",
        "hook_point": "blocks.1.hook_resid_post",
        "dataset": str(corpus),
        "F": 128,
        "L0_target": 8,
        "R2_target": 0.99,
        "lr": 0.004,
        "total_tokens": 32_768,
        "batch_size": 512,
        "seq_len": 64,
        "method": {"phase2_fraction": 0.2},
        "constants": {"delta_cov": 0.3},
        "evaluate": {"tokens": 4096, "sweep_tokens": 2048, "sweep_factors": [0.7, 1.0]},
        "baselines": {"lrs": [0.002, 0.008]},
        "runtime": {"device": "cpu", "log_every_steps": 4, "checkpoint_every_steps": 8},
        **changes,
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A megabyte of the standard library, as text files."""
    directory = tmp_path_factory.mktemp("corpus")
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        (directory / f"{path.stem}.txt").write_text(text, encoding="utf-8")
        size += len(text)
        if size > 1_000_000:
            break
    return directory


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Run:
    """Every step, run once without disturbance."""
    base = tmp_path_factory.mktemp("reference")
    config = base / "run.yaml"
    config.write_text(yaml.safe_dump(small_config(corpus)), encoding="utf-8")
    result = Run(base / "run", config)
    for step in STEPS:
        outcome = result.run(step)
        assert outcome.status == 0, (step, outcome.errors)
    return result


@pytest.fixture
def fresh(reference: Run, tmp_path: Path) -> Callable[[str], Run]:
    """``fresh(step)``: a copy of the reference in which everything before ``step`` is done."""

    def make(step: str) -> Run:
        result = Run(tmp_path / "run", reference.config)
        result.directory.mkdir()
        for earlier in STEPS[:1] if step == "baseline" else STEPS[: STEPS.index(step)]:
            shutil.copytree(reference.output(earlier), result.output(earlier))
        return result

    return make


def assert_same(result: Run, reference: Run, names: tuple[str, ...] = COMPARED) -> None:
    for name in names:
        there, here = reference.directory / name, result.directory / name
        assert here.read_bytes() == there.read_bytes(), f"{name} differs"


def assert_no_litter(result: Run) -> None:
    """No temporary file or directory is left, anywhere."""
    assert not [path for path in result.directory.rglob("*") if path.name.endswith(".tmp")]
