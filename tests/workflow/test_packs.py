"""``pack: true``: one job trains every cell of a model; what the cells leave is unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workflow.conftest import Sweep
from tests.workflow.test_steps import run_config
from tests.workflow.test_workflow import CELL_STEPS, REPORT
from workflow import resources


def run(sweep: Sweep, **environment: str) -> list[list[str]]:
    """Run the sweep; the calls that this added."""
    before = len(sweep.calls())
    result = sweep.run("--quiet", "all", **environment)
    assert result.returncode == 0, result.stdout
    return sweep.calls()[before:]


@pytest.fixture
def packed(sweep: Sweep) -> Sweep:
    sweep.configure(pack=True)
    return sweep


def test_one_job_gets_every_cell_and_the_phases_take_its_results(packed: Sweep) -> None:
    assert packed.planned() == {"calibrate": 1, "pack": 1, **dict.fromkeys(CELL_STEPS, 2), **REPORT}
    calls = run(packed)
    steps = [call[0] for call in calls]
    assert {step: steps.count(step) for step in steps} == {
        "calibrate": 1, "pack": 1, **dict.fromkeys(CELL_STEPS, 2), **REPORT,
    }  # fmt: skip
    (pack,) = (call for call in calls if call[0] == "pack")
    places = [f"results/tiny/L0_{target}/seed_0" for target in (4, 8)]
    first = pack.index("--cell")
    assert pack[first : first + 8] == [
        "--cell", "4", "0", places[0], "--cell", "8", "0", places[1],
    ]  # fmt: skip
    settings = json.loads(pack[pack.index("--settings") + 1])
    assert "L0_target" not in settings
    assert "seed" not in settings
    assert settings["F"] == 256
    phases = [call for call in calls if call[0] in ("phase1", "phase2")]
    assert all("--finished-only" in call for call in phases)
    assert all(call[call.index("--device") + 1] == "cpu" for call in phases)
    assert packed.planned() == {}


def test_a_cell_without_a_result_is_trained_by_its_own_job(packed: Sweep) -> None:
    alone = "results/tiny/L0_8/seed_0"
    calls = run(packed, STUB_DIVERGE=alone)
    taken = {
        (call[0], Path(call[call.index("--out") + 1]).parts[2]): "--finished-only" in call
        for call in calls
        if call[0] in ("phase1", "phase2")
    }
    assert taken == {
        ("phase1", "L0_4"): True,
        ("phase2", "L0_4"): True,
        ("phase1", "L0_8"): False,
        ("phase2", "L0_8"): False,
    }


def test_without_pack_nothing_of_it_is_planned(finished: Sweep) -> None:
    assert finished.planned() == {}
    assert not (finished.directory / "results/tiny/pack.json").exists()


def test_a_new_cell_is_trained_by_the_pack_and_no_other_is(packed: Sweep) -> None:
    run(packed)
    packed.configure(pack=True, grid={"L0_target": [4, 8, 16], "seed": [0]})
    calls = run(packed)
    assert [call[0] for call in calls].count("pack") == 1
    phases = [call for call in calls if call[0] in ("phase1", "phase2")]
    assert all("--finished-only" in call for call in phases)
    assert [call[0] for call in calls].count("init") == 1


def test_results_stay_findable_and_checkpoints_go(packed: Sweep) -> None:
    run(packed)
    cell = packed.directory / "results/tiny/L0_4/seed_0"
    assert (cell / "phase1.checkpoints/finished_0/metadata.json").exists()
    assert not (cell / "phase1.checkpoints/step_10").exists()
    assert not (cell / "evaluation.checkpoints").exists()


def test_variants_are_packs_of_their_own(packed: Sweep) -> None:
    packed.configure(pack=True, variants={"slow": {"train": {"lr": 1e-4}}})
    assert packed.planned()["pack"] == 2
    calls = run(packed)
    packs = [call for call in calls if call[0] == "pack"]
    assert sorted(call[call.index("--out") + 1] for call in packs) == [
        "results/tiny/pack.json",
        "results/tiny/slow/pack.json",
    ]
    rates = {json.loads(call[call.index("--settings") + 1]).get("lr") for call in packs}
    assert rates == {None, 1e-4}


def test_a_pack_asks_for_the_weights_of_all_and_the_language_model_once() -> None:
    config = run_config(F=32_768, total_tokens=10**8, batch_size=4096, runtime={"device": "cuda"})
    site = resources.Site(d_model=2048, d_vocab=50_000, tokens_per_second=1e5)
    one, five = (resources.memory_mb("pack", config, 1, site, cells) for cells in (1, 5))
    alone = resources.memory_mb("phase1", config, 1, site)
    assert one == alone
    weights = 4 * 16 * 2 * 32_768 * 2048 / 1e6
    assert 1.1 * weights < five - one < 1.3 * weights
    times = [resources.minutes("pack", config, 1, site, None, cells) for cells in (1, 5)]
    both = sum(resources.minutes(step, config, 1, site) for step in ("phase1", "phase2"))
    assert times[0] <= both
    assert times[0] < times[1] < 5 * times[0]
