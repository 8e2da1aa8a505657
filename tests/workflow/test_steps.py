"""What each step is told, the schema, the shipped configurations, and the check CI runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from spalf.config import RunConfig, load_run, load_sweep, parse
from spalf.report.aggregate import aggregate
from spalf.steps.calibrate import calibration_settings
from spalf.steps.context import training_settings
from spalf.steps.initialise import init_settings
from spalf.steps.train import PROCEDURE
from tests.workflow import synthetic
from tests.workflow.conftest import ROOT
from workflow import resources, steps
from workflow.scripts.check_frontier import faults, lost_to_chance
from workflow.scripts.write_schema import SCHEMA, schema_text

CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "config" / "experiments").glob("*.yaml"))
UNUSED_BY_CALIBRATION = {"F": 2**20, "L0_target": 1}


def run_config(**changes: Any) -> RunConfig:
    base = {
        "model_name": "spalf/demo-2l",
        "hook_point": "blocks.0.hook_resid_post",
        "dataset": "python-stdlib",
        "F": 1024,
        "L0_target": 8,
        "total_tokens": 100_000,
        "batch_size": 1024,
    }
    return RunConfig.model_validate({**base, **changes})


@pytest.mark.parametrize("step", steps.FIELDS)
def test_settings_are_enough_for_a_run_config(step: str) -> None:
    config = run_config(seq_len=96, batch_size=960, seed=3, evaluate={"tokens": 5000})
    given = json.loads(steps.settings(step, config))
    parsed = parse(RunConfig, {**UNUSED_BY_CALIBRATION, **given}, step)
    assert parsed.model_name == config.model_name
    assert (parsed.seq_len, parsed.batch_size) == (96, 960)


ABLATIONS = load_sweep(ROOT / "config" / "ablations.yaml")


@pytest.mark.parametrize("variant", ["", *ABLATIONS.variants])
def test_a_step_is_told_all_that_its_result_depends_on(variant: str) -> None:
    """Or the next step would not know its own input again."""
    cell = next(cell for cell in ABLATIONS.cells() if cell.variant == variant)
    config = ABLATIONS.run_config(cell)
    for step in ("calibrate", "init", "phase1", "phase2"):
        told = parse(
            RunConfig, UNUSED_BY_CALIBRATION | json.loads(steps.settings(step, config)), step
        )
        ours, theirs = calibration_settings(config), calibration_settings(told)
        for one in (ours, theirs):
            one.pop("evaluate")  # calibration reserves more than a cell is measured on
        assert theirs == ours, step
        if step != "calibrate":
            assert init_settings(told) == init_settings(config), step
        if step.startswith("phase"):
            assert training_settings(told) == training_settings(config), step


def test_calibration_is_shared_by_every_cell() -> None:
    one = run_config()
    two = run_config(L0_target=32, seed=5, F=2048, lr=1e-2, R2_target=0.5, method={"capu": False})
    assert steps.settings("calibrate", one) == steps.settings("calibrate", two)


def test_training_steps_hold_the_whole_configuration_but_evaluation() -> None:
    runtime = {"log_every_steps": 3, "threads": 2}
    config = run_config(lr=1e-2, R2_target=0.5, evaluate={"tokens": 5000}, runtime=runtime)
    given = json.loads(steps.settings("phase1", config))
    assert given["runtime"] == {"log_every_steps": 3}
    assert "evaluate" not in given
    assert json.loads(resources.execution(config)) == {"threads": 2}
    whole = parse(RunConfig, given | {"evaluate": {"tokens": 5000}}, "phase1")
    assert whole.model_dump(exclude={"runtime"}) == config.model_dump(exclude={"runtime"})


@pytest.mark.parametrize(("tokens", "reserve"), [(10, 131_072), (131_073, 262_144)])
def test_evaluation_split_has_room(tokens: int, reserve: int) -> None:
    given = json.loads(steps.settings("calibrate", run_config(evaluate={"tokens": tokens})))
    parsed = parse(RunConfig, {**UNUSED_BY_CALIBRATION, **given}, "calibrate")
    assert parsed.evaluate.tokens == reserve


def test_a_gpu_is_asked_for_unless_the_device_is_the_cpu() -> None:
    assert resources.gpus(run_config()) == 1
    assert resources.gpus(run_config(runtime={"device": "cuda:1"})) == 1
    assert resources.gpus(run_config(runtime={"device": "cpu"})) is None


def test_threads_follow_the_configuration() -> None:
    assert resources.threads(run_config(runtime={"threads": 7})) == 7
    assert resources.threads(run_config(runtime={"device": "cpu"})) == 1


def test_a_baseline_that_takes_its_rate_asks_for_one_training() -> None:
    config = run_config(F=32_768, baselines={"lrs": [1e-3, 2e-3, 3e-3]})
    alone = resources.at_one_rate(config)
    assert alone == run_config(F=32_768, baselines={"lrs": [1e-3]})
    for needed in (resources.memory_mb, resources.minutes):
        assert needed("baseline", alone) < needed("baseline", config)


@pytest.mark.parametrize("step", steps.FIELDS)
def test_requests_grow_with_the_run_and_with_each_retry(step: str) -> None:
    small = run_config(total_tokens=10**7)
    large = run_config(F=65536, total_tokens=10**9, evaluate={"tokens": 10**7})
    assert resources.memory_mb(step, small) < resources.memory_mb(step, large)
    assert resources.memory_mb(step, large) < resources.memory_mb(step, large, attempt=2)
    assert resources.minutes(step, small) < resources.minutes(step, large)
    assert resources.minutes(step, large) < resources.minutes(step, large, attempt=2)


def test_two_demo_cells_fit_side_by_side_in_four_gigabytes() -> None:
    demo = load_sweep(ROOT / "config" / "config.yaml")
    configs = [demo.run_config(cell) for cell in demo.cells()]
    assert max(resources.memory_mb(step, c) for step in steps.FIELDS for c in configs) <= 4096


def test_every_step_has_a_revision() -> None:
    assert set(steps.FIELDS) <= set(steps.REVISIONS)


def test_a_new_procedure_of_training_is_a_new_revision_of_its_steps() -> None:
    """Training refuses to go on from another procedure's files; Snakemake has to make them anew."""
    revisions = tuple(steps.REVISIONS[step] for step in ("phase1", "phase2", "pack"))
    assert (PROCEDURE, *revisions) == (6, 8, 8, 6), "one was raised: raise the others, and these"


def test_schema_is_in_step_with_the_types() -> None:
    remedy = "run python -m workflow.scripts.write_schema"
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), remedy


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_sweep_is_valid(path: Path) -> None:
    assert list(load_sweep(path).cells())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiment_is_valid(path: Path) -> None:
    assert load_run(path).output_dir == f"results/experiments/{path.stem}"


def test_experiments_cover_the_models_of_the_issue() -> None:
    names = {"demo-2l", "demo-4l", "pythia-160m", "pythia-1.4b", "gpt2", "llama-3-8b"}
    assert {path.stem for path in EXPERIMENTS} == names


@pytest.fixture
def tables(tmp_path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    paths = [
        synthetic.write_evaluation(tmp_path / f"{target}.json", "m", target) for target in (8, 16)
    ]
    frontier, phases = aggregate(paths, tmp_path)
    return pd.read_csv(frontier), pd.read_csv(phases)


def test_check_accepts_a_good_frontier(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    assert faults(*tables) == []


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("l0", 8.5, "L0 8.50 and R² below target"),
        ("dead_fraction", 0.2, "20.0% dead"),
        ("dead_fraction", float("nan"), "dead"),
        ("delta_ce", 0.01, "does not fall"),
    ],
)
def test_check_names_the_faulty_cell(
    tables: tuple[pd.DataFrame, pd.DataFrame], column: str, value: float, words: str
) -> None:
    frontier, phases = tables
    frontier.loc[0, column] = value
    found = faults(frontier, phases)
    assert len(found) == 1
    assert words in found[0]


def test_check_excuses_a_cell_that_reached_its_fidelity(
    tables: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    frontier, phases = tables
    frontier.loc[0, ["l0", "explained_variance"]] = [5.0, 0.995]
    assert faults(frontier, phases) == []


def test_check_wants_training_to_beat_chance(tmp_path: Path) -> None:
    paths = []
    for method, delta in (("spalf", 0.3), ("random", 3.0)):
        record = synthetic.evaluation("m", 8, method=method)
        record["phases"]["phase2"] |= {"delta_ce": delta, "explained_variance": 1 - delta / 4}
        paths.append(tmp_path / f"{method}.json")
        paths[-1].write_text(json.dumps(record), encoding="utf-8")
    frontier, phases = (pd.read_csv(path) for path in aggregate(paths, tmp_path))
    assert faults(frontier, phases) == []
    frontier.loc[frontier.method == "random", "explained_variance"] = 0.99
    (fault,) = faults(frontier, phases)
    assert "no better than a random SAE" in fault


def test_check_wants_every_measure_of_the_manuscript_to_beat_chance() -> None:
    won = {"won": "3", "total": "3", "lost": []}
    assert lost_to_chance({"sanity": won}) == []
    (fault,) = lost_to_chance({"sanity": {**won, "won": "2", "lost": ["m/L0_8/seed_0: KL"]}})
    assert fault == "m/L0_8/seed_0: KL: no better than a random SAE"
    assert lost_to_chance({"sanity": {"won": "0", "total": "0", "lost": []}})


def test_check_wants_phase2_to_help(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    frontier, phases = tables
    phases.loc[phases.phase == "phase2", "delta_ce"] = 1.0
    assert len(faults(frontier, phases)) == 2
