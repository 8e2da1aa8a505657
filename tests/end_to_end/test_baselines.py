"""The workflow with every method, on a bundled model and a budget that trains next to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

pytest.importorskip("sae_lens")

ROOT = Path(__file__).parents[2]
METHODS = ["spalf", "batchtopk", "topk", "jumprelu", "random"]
BASELINES = METHODS[1:4]
CONFIG: dict[str, Any] = {
    "models": {"tiny": {"model_name": "spalf/demo-2l", "hook_point": "blocks.1.hook_resid_post"}},
    "dataset": "python-stdlib",
    "grid": {"L0_target": [8], "seed": [0]},
    "methods": METHODS,
    "train": {"F": 96, "lr": 0.004, "total_tokens": 65536, "batch_size": 512, "seq_len": 64},
    "baselines": {"lrs": [0.002, 0.008, 0.03]},
    "evaluate": {"tokens": 4096, "sweep_tokens": 1024, "absorption": False},
    "constants": {"delta_cov": 0.3},
    "runtime": {"device": "cpu", "threads": 1, "log_every_steps": 1},
}


@pytest.mark.timeout(900)
def test_one_sweep_has_a_row_and_a_curve_for_every_method(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", "config.yaml", "--cores", "2", "--quiet", "all"]
    command += ["--", "all", "paper"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=840,
    )
    assert run.returncode == 0, run.stdout
    results = tmp_path / "results"
    frontier = pd.read_csv(results / "tables" / "frontier.csv").set_index("method")
    assert sorted(frontier.index) == sorted(METHODS)
    assert frontier["explained_variance"].between(0, 1).all()
    assert frontier.loc["topk", "l0"] <= 8
    assert set(frontier.loc[BASELINES, "lr"]) <= set(CONFIG["baselines"]["lrs"])
    assert frontier.loc["spalf", "lr"] == CONFIG["train"]["lr"]
    assert "k=8" in frontier.loc["batchtopk", "hyperparameters"]
    assert frontier.loc["jumprelu", "lambda_faith"] != frontier.loc["jumprelu", "lambda_faith"]
    phases = pd.read_csv(results / "tables" / "phases.csv")
    assert sorted(phases["phase"]) == ["phase1", "phase2", *["sae"] * 4]
    # Every method read the same tokens and was measured on the same ones.
    assert frontier["ce_clean"].nunique() == 1
    assert (results / "figures" / "pareto.png").stat().st_size > 10_000
    table = (results / "tables" / "frontier.md").read_text(encoding="utf-8")
    assert "lr_tried=0.002 0.008 0.03" in table
    cells = [results / "tiny" / method / "L0_8" / "seed_0" for method in METHODS[1:]]
    for cell in cells:
        assert {path.name for path in (cell / "baseline").iterdir()} == {
            "cfg.json",
            "metadata.json",
            "sae_weights.safetensors",
        }
        assert json.loads((cell / "evaluation.json").read_text())["cell"]["method"] in METHODS
    paper_of(results)


def paper_of(results: Path) -> None:
    """The manuscript of the same sweep, and what is recorded of it."""
    paper = results / "paper"
    assert (paper / "paper.pdf").read_bytes().startswith(b"%PDF")
    numbers = json.loads((paper / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["counts"]["saes"] == str(len(METHODS)) and not numbers["counts"]["missing"]
    assert numbers["built"]["config"] == "config.yaml"
    assert numbers["built"]["device"] == "cpu"
    settings = (paper / "tables" / "settings.csv").read_text(encoding="utf-8")
    assert all(method in settings for method in BASELINES)
    probed = (paper / "tables" / "probing.csv").read_text(encoding="utf-8").splitlines()
    assert len(probed) == 1 + len(METHODS) + 1
    command = [sys.executable, "-c", "from spalf.cli.main import main; main()", "provenance"]
    told = subprocess.run(
        [*command, "results/paper/figures/pareto.pdf"],
        cwd=results.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    assert "again     snakemake --configfile config.yaml --force -- paper" in told.stdout
    assert told.stdout.count("unchanged") > 2 * len(METHODS)
