from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spalf.config import RunConfig, parse
from spalf.data import TokenSplits
from spalf.steps.context import StepContext
from spalf.steps.pipeline import train_run
from tests.helpers_planted import Silent


@pytest.fixture(scope="session")
def demo_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A short run on a bundled model."""
    settings = {
        "model_name": "spalf/demo-2l",
        "hook_point": "blocks.1.hook_resid_post",
        "dataset": "python-stdlib",
        "F": 96,
        "L0_target": 8.0,
        "lr": 0.004,
        "total_tokens": 76_800,
        "batch_size": 512,
        "seq_len": 64,
        "output_dir": str(tmp_path_factory.mktemp("demo run")),
        "evaluate": {"tokens": 4096, "sweep_factors": [1.0], "absorption": False},
        "method": {"phase2_fraction": 0.05},
        "constants": {"delta_cov": 0.3},
        "runtime": {"device": "cpu"},
    }
    return parse(RunConfig, settings, "settings")


@pytest.fixture(scope="session")
def cpu_context() -> StepContext:
    return StepContext(torch.device("cpu"), lambda: False, lambda *_: Silent())


@pytest.fixture(scope="session")
def demo_run(demo_config: RunConfig, cpu_context: StepContext) -> Path:
    """The directory of that run's steps, from text to evaluation."""
    train_run(demo_config, cpu_context)
    return Path(demo_config.output_dir)


@pytest.fixture(scope="session")
def demo_tokens(demo_run: Path) -> torch.Tensor:
    """Held-out sequences of that run, ``[64, 64]``."""
    splits = TokenSplits.open(demo_run / "calibration" / "tokens")
    return splits.evaluation.sequences(0, 64, seed=0)
