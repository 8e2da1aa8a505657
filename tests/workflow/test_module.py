"""The workflow as a module of another one, as Snakemake's conventions have it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from spalf.config import DatasetConfig, EvaluateConfig, SweepConfig
from tests.workflow.conftest import ROOT, SMALL, Sweep

OUTER = """
configfile: "config.yaml"

module spalf:
    snakefile: "{root}/Snakefile"
    config: config["spalf"]

use rule * from spalf as spalf_*

rule best:
    input: rules.spalf_aggregate.output.frontier
    output: "best.txt"
    shell: "cp {{input}} {{output}}"

rule everything:
    default_target: True
    input: rules.best.output, rules.spalf_all.input
"""


@pytest.fixture
def outer(sweep: Sweep) -> Sweep:
    """Another project, with its own configuration and a folder `workflow` of its own."""
    text = OUTER.format(root=ROOT)
    (sweep.directory / "Snakefile").write_text(text, encoding="utf-8")
    own = sweep.directory / "workflow"
    own.mkdir()
    (own / "steps.py").write_text("raise ImportError('the wrong module')", encoding="utf-8")
    config = {"threshold": 3, "spalf": SMALL}
    (sweep.directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return Sweep(sweep.directory, sweep.directory, sweep.bin)


def test_another_workflow_plans_the_rules_of_this_one(outer: Sweep) -> None:
    planned = outer.planned()
    assert planned.pop("best") == 1
    assert planned.pop("everything", 1) == 1
    assert planned.pop("spalf_all", 1) == 1
    cell = dict.fromkeys((f"spalf_{s}" for s in ("init", "phase1", "phase2", "evaluate")), 2)
    report = dict.fromkeys((f"spalf_{s}" for s in ("aggregate", "tables", "figures")), 1)
    assert planned == {"spalf_calibrate": 1, **cell, **report}


def test_another_workflow_runs_them_with_its_own_values_on_the_command_line(outer: Sweep) -> None:
    done = outer.run("--cores", "2", "--config", "threshold=4")
    assert done.returncode == 0, done.stdout
    assert (outer.directory / "best.txt").read_text(encoding="utf-8") == "aggregate"
    log = outer.directory / "results/tiny/L0_4/seed_0/logs/phase1.log"
    assert re.match(r"job - on \S+", log.read_text(encoding="utf-8"))  # the launcher was found
    assert outer.planned("--config", "threshold=5") == {}
    done = outer.run("--report", "report.html")
    assert done.returncode == 0, done.stdout
    report = (outer.directory / "report.html").read_text(encoding="utf-8")
    assert '"results/figures/pareto.png"' in report and '"Course of training"' in report


def test_a_fault_in_what_it_is_given_is_one_line(outer: Sweep) -> None:
    config = {"spalf": {**SMALL, "train": {**SMALL["train"], "learning_rate": 1}}}
    (outer.directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = outer.run("--quiet", "all")
    assert result.returncode == 2
    (line,) = [line for line in result.stdout.splitlines() if "learning_rate" in line]
    assert "unknown key" in line


def test_the_catalogue_describes_the_workflow() -> None:
    text = (ROOT / ".snakemake-workflow-catalog.yml").read_text(encoding="utf-8")
    usage = yaml.safe_load(text)["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["software-stack-deployment"]["conda"] is True
    assert Path(ROOT, "environment.yml").exists()


def test_the_page_about_the_configuration_names_every_key_and_file() -> None:
    """What the catalogue shows, and what a new project has beside its configuration."""
    text = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", text))
    assert set(SweepConfig.model_fields) <= named
    assert {"F", "R2_target", "lr", "total_tokens", "batch_size", "seq_len"} <= named
    assert set(DatasetConfig.model_fields) | set(EvaluateConfig.model_fields) <= named
    assert {path.name for path in (ROOT / "config").glob("*.yaml")} <= named
