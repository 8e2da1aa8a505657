"""The manuscript: equal bytes from equal results, and what it says where cells are missing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spalf.cli.paper import paper
from spalf.config import SweepConfig, parse_sweep
from spalf.errors import UserError
from spalf.report.paper import build_paper
from spalf.report.paper_tables import Result, frontier_slopes
from tests.workflow import synthetic
from tests.workflow.conftest import ROOT, SMALL, Sweep
from workflow import steps

pytest.importorskip("typst", reason="the manuscript needs spalf[paper]")

MANUSCRIPT = ROOT / "paper" / "manuscript.typ"
TARGETS = (8, 16)


@pytest.fixture
def sweep_config() -> SweepConfig:
    grid = {"L0_target": list(TARGETS), "seed": [0, 1]}
    methods = {"methods": ["spalf", "batchtopk"], "variants": {"fast": {"train": {"lr": 0.002}}}}
    return parse_sweep({**copy.deepcopy(SMALL), "grid": grid, **methods}, "test")


@pytest.fixture
def results(tmp_path: Path, sweep_config: SweepConfig) -> Path:
    folder = tmp_path / "results"
    for cell in sweep_config.cells():
        place = folder / cell.place
        more: dict[str, Any] = {"method": cell.method, "variant": cell.variant}
        record = synthetic.evaluation(cell.model, cell.L0_target, cell.seed, **more)
        if cell.method != "spalf":
            record |= {"phases": {"sae": record["phases"]["phase1"]}, "final": "sae"}
        elif not cell.variant:
            for phase in (1, 2):
                log = place / f"phase{phase}" / "metrics.jsonl"
                synthetic.write_metrics(log, cell.L0_target, phase)
        place.mkdir(parents=True, exist_ok=True)
        (place / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_two_builds_are_equal_byte_for_byte(
    results: Path, sweep_config: SweepConfig, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "results"
    shutil.copytree(results, moved)
    for source, out in ((results, "one"), (moved, "two")):
        build_paper(sweep_config, source, MANUSCRIPT, tmp_path / out)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name] != two[name]]
    wanted = {"paper.pdf", "numbers.json", "figures/pareto.pdf", "figures/course_tiny.pdf"}
    assert wanted | {"tables/frontier.csv", "tables/comparison.tex"} <= one.keys()
    assert one["paper.pdf"].startswith(b"%PDF")


def test_another_result_is_another_paper(
    results: Path, sweep_config: SweepConfig, tmp_path: Path
) -> None:
    build_paper(sweep_config, results, MANUSCRIPT, tmp_path / "paper")
    before = contents(tmp_path / "paper")
    path = results / "tiny/L0_8/seed_0/evaluation.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["phases"]["phase2"]["l0"] = 9.0
    path.write_text(json.dumps(record), encoding="utf-8")
    build_paper(sweep_config, results, MANUSCRIPT, tmp_path / "paper")
    after = contents(tmp_path / "paper")
    assert json.loads(before["numbers.json"])["abstract"]["l0_within"] == "1.0%"
    assert json.loads(after["numbers.json"])["abstract"]["l0_within"] == "12.5%"
    assert before["paper.pdf"] != after["paper.pdf"]


def test_baselines_and_variants_are_compared_at_equal_l0(
    results: Path, sweep_config: SweepConfig, tmp_path: Path
) -> None:
    build_paper(sweep_config, results, MANUSCRIPT, tmp_path / "paper")
    rows = (tmp_path / "paper/tables/comparison.csv").read_text(encoding="utf-8").splitlines()
    # A baseline has what SPALF had before Phase 2, which multiplied ΔCE by 0.8;
    # the variant equals it.
    assert rows[1:] == ["tiny,batchtopk,1.25,1.25,1.25,4,0", "tiny,fast,1.00,1.00,1.00,4,0"]


def test_a_missing_cell_is_refused_or_listed(
    results: Path, sweep_config: SweepConfig, tmp_path: Path
) -> None:
    gone = "tiny/L0_16/seed_1"
    (results / gone / "evaluation.json").unlink()
    with pytest.raises(UserError, match=gone):
        build_paper(sweep_config, results, MANUSCRIPT, tmp_path / "paper")
    assert not (tmp_path / "paper").exists()
    build_paper(sweep_config, results, MANUSCRIPT, tmp_path / "paper", partial=True)
    numbers = json.loads((tmp_path / "paper/numbers.json").read_text(encoding="utf-8"))
    assert numbers["counts"]["missing"] == [gone]
    assert (numbers["counts"]["found"], numbers["counts"]["expected"]) == ("11", "12")


def test_nothing_to_build_from_is_one_line(sweep_config: SweepConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluation\.json"):
        build_paper(sweep_config, tmp_path, MANUSCRIPT, tmp_path / "paper", partial=True)


def test_a_fault_of_the_manuscript_is_told(
    results: Path, sweep_config: SweepConfig, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.typ"
    broken.write_text("#nonsense()", encoding="utf-8")
    with pytest.raises(UserError, match="nonsense"):
        build_paper(sweep_config, results, broken, tmp_path / "paper")


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    def result(l0: float) -> Result:
        record = synthetic.evaluation("m", l0)
        record["phases"]["phase1"] |= {"l0": l0, "mse": l0**-0.5}
        return Result(f"m/{l0:g}", record, None)

    slopes = frontier_slopes([result(l0) for l0 in (4, 8, 16)])
    assert slopes == pytest.approx({"m/4": 2.0, "m/8": 2.0, "m/16": 2.0})


def test_the_command_reads_what_the_workflow_gives_it(
    results: Path, sweep_config: SweepConfig, tmp_path: Path
) -> None:
    arguments = ["--settings", steps.sweep_settings(sweep_config), "--results", str(results)]
    arguments += ["--manuscript", str(MANUSCRIPT), "--out", str(tmp_path / "paper")]
    done = CliRunner().invoke(paper, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "paper" / "paper.pdf").exists()


def test_it_is_made_on_demand_and_the_partial_one_trains_nothing(finished: Sweep) -> None:
    assert finished.planned() == {}
    assert finished.planned("--", "paper") == {"paper": 1}
    cell = finished.directory / "results/tiny/L0_4/seed_0"
    (cell / "evaluation.json").unlink()
    assert finished.planned("--", "paper") == {"evaluate": 1, "paper": 1}
    assert finished.planned("--", "paper_partial") == {"paper_partial": 1}
