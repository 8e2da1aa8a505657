"""The manuscript: equal bytes from equal results, and what it says where results are missing."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from spalf.config import SweepConfig, load_sweep, parse_sweep
from spalf.errors import UserError
from spalf.report.aggregate import aggregate
from spalf.report.paper import build, build_paper, figures
from spalf.report.paper.comparisons import changes
from spalf.report.paper.page import results_page
from spalf.report.paper.results import Result, as_table, frontier_slopes, read_results
from spalf.report.paper.sheet import latex, number, spread
from tests.workflow import synthetic
from tests.workflow.conftest import ROOT, SMALL, Sweep
from workflow import steps
from workflow.scripts.write_results_page import write

pytest.importorskip("typst", reason="the manuscript needs spalf[paper]")

MANUSCRIPT = ROOT / "paper" / "manuscript.typ"
METHODS = ["spalf", "batchtopk", "random"]
VARIANTS = {
    "anchors": {"method": {"anchors": True}},
    "kappa-half": {"constants": {"kappa": 50}},
    "fast": {"train": {"lr": 0.002}},
}


def config(**changes: Any) -> SweepConfig:
    grid = {"L0_target": [8, 16], "seed": [0, 1]}
    given = {**copy.deepcopy(SMALL), "grid": grid, "methods": METHODS, "variants": VARIANTS}
    return parse_sweep({**given, **changes}, "test")


def little() -> SweepConfig:
    """The smallest grid that has a frontier."""
    return config(methods=["spalf"], variants={}, grid={"L0_target": [8, 16], "seed": [0]})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of the smallest grid."""
    synthetic.write_sweep(tmp_path / "results", little())
    return tmp_path / "results"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def build_in(directory: Path, hash_seed: str) -> dict[str, bytes]:
    """The whole command in a process of its own, as the workflow calls it."""
    sweep = config()
    synthetic.write_sweep(directory / "results", sweep)
    said = steps.origin("paper", ["grid.yaml"], {}, sweep)
    code = "from spalf.cli.main import main; main()"
    arguments = ["--settings", steps.sweep_settings(sweep), "--manuscript", "manuscript.typ"]
    shutil.copy(MANUSCRIPT, directory)
    done = subprocess.run(
        [sys.executable, "-c", code, "paper", *arguments, "--workflow", said, "--out", "out"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return contents(directory / "out")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a paper")


@pytest.fixture(scope="module")
def built(place: Path) -> dict[str, bytes]:
    """Everything that one build wrote, by name."""
    (place / "one").mkdir()
    return build_in(place / "one", "1")


def rows(built: dict[str, bytes], name: str) -> list[list[str]]:
    """A table without its header."""
    return list(csv.reader(built[f"tables/{name}.csv"].decode().splitlines()))[1:]


@pytest.mark.timeout(600)
def test_two_builds_are_equal_byte_for_byte(built: dict[str, bytes], place: Path) -> None:
    """Elsewhere, in another process with another hash seed: tables, figures, PDF, provenance."""
    (place / "elsewhere").mkdir()
    again = build_in(place / "elsewhere", "2")
    assert built.keys() == again.keys()
    assert not [name for name in built if built[name] != again[name]]
    wanted = {"paper.pdf", "numbers.json", "results.md", "provenance/paper.json"}
    wanted |= {"figures/pareto.pdf", "figures/course_tiny.png", "tables/frontier.csv"}
    assert wanted <= built.keys()
    assert built["paper.pdf"].startswith(b"%PDF")


def test_every_section_of_the_manuscript_has_its_table_and_figure(built: dict[str, bytes]) -> None:
    filled = {
        *("frontier", "comparison", "settings", "sanity", "phases", "ablations", "sensitivity"),
        "best_baseline",
        *("control", "drift", "dictionary", "consistency", "probing", "absorption", "cost"),
    }
    for name in filled:
        assert rows(built, name), name
    figures = json.loads(built["numbers.json"])["figures"]
    assert all(figures.values()), figures
    for files in figures.values():
        for file in files:
            assert {file, file.replace(".pdf", ".png")} <= built.keys()


def test_every_table_is_there_as_latex_of_plain_characters(built: dict[str, bytes]) -> None:
    tables = [name for name in built if name.startswith("tables/") and name.endswith(".csv")]
    for name in tables:
        if name == "tables/data/saes.csv":
            continue  # every number of every SAE; no table to print
        text = built[name.replace(".csv", ".tex")].decode("ascii")
        assert r"\toprule" in text
        if name == "tables/frontier.csv":
            assert r"\begin{tabular}{llrrrrrrrrr}" in text
        assert text.count(r"\\") == len(built[name].decode().splitlines())


def test_every_figure_and_table_is_used_by_the_manuscript(built: dict[str, bytes]) -> None:
    text = MANUSCRIPT.read_text(encoding="utf-8")
    shown = set(re.findall(r'#(?:shown|drawn)\("(\w+)"', text))
    made = {Path(n).stem for n in built if re.fullmatch(r"tables/\w+\.csv", n)}
    assert shown == made | set(json.loads(built["numbers.json"])["figures"])


def test_every_figure_says_what_its_error_bars_are() -> None:
    text = MANUSCRIPT.read_text(encoding="utf-8")
    captions = re.findall(r'#drawn\("\w+"\)\[(.*?)\]\n', text, flags=re.DOTALL)
    assert len(captions) == len(re.findall(r"#drawn\(", text))
    for caption in captions:
        assert "error bars" in caption.lower() or "#seed-bars" in caption, caption


def test_no_result_is_typed_into_the_manuscript() -> None:
    """No number with a decimal point, but in lengths, identifiers of papers, and definitions."""
    text = MANUSCRIPT.read_text(encoding="utf-8")
    text = re.sub(r'arxiv\("[\d.]+"\)|"[\d.]+"|\d+\.\d+(?:pt|em|mm)|0\.5, of|1\.1"', "", text)
    prose = text[text.index("*Abstract*") :]
    assert set(re.findall(r"\d+\.\d+", prose)) <= {"0.7", "0.9"}  # which neighbours are near


def test_the_first_page_says_what_it_was_built_from(built: dict[str, bytes]) -> None:
    numbers = json.loads(built["numbers.json"])
    assert numbers["built"]["config"] == "grid.yaml"
    assert numbers["built"]["commit"] == "not recorded"  # made-up results have none
    assert ["torch", "2.13.0"] in numbers["built"]["packages"]
    assert {"typst", "matplotlib"} <= {name for name, _ in numbers["built"]["packages"]}
    head = MANUSCRIPT.read_text(encoding="utf-8").split("*Abstract*")[0]
    for name in ("config", "commit", "device", "machine", "python", "packages"):
        assert f"n.built.{name}" in head


def test_rows_are_means_over_seeds(built: dict[str, bytes]) -> None:
    first = rows(built, "frontier")[0]
    expected = synthetic.metrics(8, phase2=True)["delta_ce"]
    assert first[:5] == ["tiny", "spalf", "8", "2", "8.08 ± 0.00"]
    assert first[6] == f"{1.01 * expected:.3f} ± {0.02 * expected / 2**0.5:.3f}"
    assert first[9] == "3 of 256"  # 1 % of the features of each seed
    assert [row[1] for row in rows(built, "frontier")][::2] == METHODS


def test_baselines_are_compared_at_equal_l0(built: dict[str, bytes]) -> None:
    """A baseline has what SPALF had before Phase 2, which multiplied ΔCE by 0.8, over 0.8."""
    (row,) = rows(built, "comparison")
    ratio = 1 / 0.8 / 0.8
    assert row[:3] == ["tiny", "batchtopk", f"{ratio:.2f}"]
    assert row[5:] == ["4", "0"]
    best = rows(built, "best_baseline")
    assert {row[7] for row in best} == {"batchtopk"}
    assert {row[9] for row in best if row[1] == "spalf"} == {f"{1 / ratio:.3f}"}


def test_variants_are_ablations_constants_or_learning_rates(built: dict[str, bytes]) -> None:
    assert [row[:3] for row in rows(built, "ablations")] == [["tiny", "anchors", "anchors = true"]]
    sensitive = [row[:4] for row in rows(built, "sensitivity")]
    assert sensitive == [["tiny", "kappa", "50", "× 0.5"], ["tiny", "lr", "0.002", "× 6.67"]]
    assert {change.kind for change in changes(config())} == {"method", "constant", "rate"}


def test_trained_saes_are_held_against_random_ones(built: dict[str, bytes]) -> None:
    measures = {row[1]: row[2:] for row in rows(built, "sanity")}
    assert len(measures) == 9
    assert measures["explained variance"][1].endswith("(4 of 4)")
    assert measures["PW-MCC between seeds"] == ["0.090", "0.900 (4 of 4)", "0.720 (4 of 4)"]
    numbers = json.loads(built["numbers.json"])["sanity"]
    assert numbers["won"] == numbers["total"] and numbers["lost"] == []


def test_an_sae_that_is_no_better_than_chance_is_named(results: Path) -> None:
    sweep = config(methods=["spalf", "random"], variants={}, grid={"L0_target": [8], "seed": [0]})
    synthetic.write_sweep(results, sweep)
    path = results / "tiny/L0_8/seed_0/evaluation.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["phases"]["phase2"]["kl"] = 99.0
    path.write_text(json.dumps(record), encoding="utf-8")
    found = read_results(results, [cell.place for cell in sweep.cells()])
    sanity = build.comparisons.against_random(as_table(found), found, {})
    assert sanity.lost == ["tiny/L0_8/seed_0: KL"]
    assert sanity.won == sanity.total - 1


def test_another_result_is_another_paper(results: Path, tmp_path: Path) -> None:
    build_paper(little(), results, MANUSCRIPT, tmp_path / "paper")
    before = contents(tmp_path / "paper")
    path = results / "tiny/L0_8/seed_0/evaluation.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["phases"]["phase2"]["l0"] = 9.0
    path.write_text(json.dumps(record), encoding="utf-8")
    build_paper(little(), results, MANUSCRIPT, tmp_path / "paper")
    after = contents(tmp_path / "paper")
    assert json.loads(before["numbers.json"])["abstract"]["l0_within"] == "1.0%"
    assert json.loads(after["numbers.json"])["abstract"]["l0_within"] == "12.5%"
    assert before["paper.pdf"] != after["paper.pdf"]
    assert before["figures/pareto.pdf"] != after["figures/pareto.pdf"]


def test_a_missing_result_is_refused_or_marked_and_listed(tmp_path: Path) -> None:
    sweep = config(methods=["spalf"], variants={})
    synthetic.write_sweep(tmp_path, sweep)
    gone = ["tiny/L0_16/seed_1/evaluation.json", "tiny/L0_16/consistency.json"]
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="tiny/L0_16/seed_1") as refused:
        build_paper(sweep, tmp_path, MANUSCRIPT, tmp_path / "paper")
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "paper").exists()
    build_paper(sweep, tmp_path, MANUSCRIPT, tmp_path / "paper", partial=True)
    made = contents(tmp_path / "paper")
    numbers = json.loads(made["numbers.json"])
    assert numbers["counts"]["missing"] == gone
    assert (numbers["counts"]["found"], numbers["counts"]["expected"]) == ("4", "6")
    assert [row[0] for row in rows(made, "missing")] == gone
    assert rows(made, "consistency") and len(rows(made, "frontier")) == 2
    page = made["results.md"].decode()
    said = "**Incomplete**: 2 of 6 results missing, 1 of them comparisons of seeds."
    assert said in page and gone[0] in page


def test_a_figure_is_marked_where_what_it_shows_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparisons of seeds are in one figure; the others are whole without them."""
    notes: dict[str, str] = {}

    def noted(function: Any) -> Any:
        def draw(*given: Any) -> Any:
            notes[function.__name__] = given[-1]
            return function(*given)

        return draw

    for name in ("pareto_figure", "course_figure", "consistency_figure"):
        monkeypatch.setattr(figures, name, noted(getattr(figures, name)))
    sweep = config(methods=["spalf"], variants={})
    synthetic.write_sweep(tmp_path, sweep)
    (tmp_path / "tiny/L0_16/consistency.json").unlink()
    build_paper(sweep, tmp_path, MANUSCRIPT, tmp_path / "paper", partial=True)
    assert notes == {
        "pareto_figure": "",
        "course_figure": "",
        "consistency_figure": "incomplete: 1 of 2 comparisons are missing",
    }
    page = (tmp_path / "paper/results.md").read_text(encoding="utf-8")
    assert "1 of 6 results missing, all of them comparisons of seeds." in page
    (tmp_path / "tiny/L0_16/seed_1/evaluation.json").unlink()
    build_paper(sweep, tmp_path, MANUSCRIPT, tmp_path / "paper", partial=True)
    assert notes["pareto_figure"] == "incomplete: 1 of 4 evaluations are missing"


def test_nothing_to_build_from_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.json"):
        build_paper(little(), tmp_path, MANUSCRIPT, tmp_path / "paper", partial=True)


def test_evaluations_of_an_earlier_version_still_make_tables_and_a_paper(
    results: Path, tmp_path: Path
) -> None:
    paths = sorted(results.rglob("evaluation.json"))
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        for part in ("probing", "decoder"):
            del record[part]
        path.write_text(json.dumps(record), encoding="utf-8")
    frontier, _ = aggregate(paths, tmp_path / "tables")
    assert len(pd.read_csv(frontier)) == 2
    build_paper(little(), results, MANUSCRIPT, tmp_path / "paper")
    made = contents(tmp_path / "paper")
    assert not rows(made, "probing") and not rows(made, "dictionary")
    figures = json.loads(made["numbers.json"])["figures"]
    assert figures["pareto"] and not figures["probing"]


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": ["batchtopk"]},
        {"methods": ["random"]},
        {"grid": {"L0_target": [8], "seed": [0]}},
        {"methods": ["spalf", "topk"], "grid": {"L0_target": [8], "seed": [0, 1]}},
    ],
    ids=["no SPALF", "nothing trained", "one SAE", "one L0"],
)
def test_grids_that_leave_sections_empty(changes: dict[str, Any], tmp_path: Path) -> None:
    sweep = config(**{"methods": ["spalf"], "variants": {}, **changes})
    synthetic.write_sweep(tmp_path / "results", sweep)
    build_paper(sweep, tmp_path / "results", MANUSCRIPT, tmp_path / "paper")
    made = contents(tmp_path / "paper")
    assert rows(made, "frontier") and made["paper.pdf"]
    assert "nan" not in made["numbers.json"].decode()


def test_a_fault_of_the_manuscript_is_told(results: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.typ"
    broken.write_text("#nonsense()", encoding="utf-8")
    with pytest.raises(UserError, match="nonsense"):
        build_paper(little(), results, broken, tmp_path / "paper")


def test_a_damaged_comparison_of_seeds_is_named(tmp_path: Path) -> None:
    sweep = config(methods=["spalf"], variants={})
    synthetic.write_sweep(tmp_path, sweep)
    (tmp_path / "tiny/L0_8/consistency.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tiny/L0_8/consistency\.json"):
        build_paper(sweep, tmp_path, MANUSCRIPT, tmp_path / "paper")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["config", "baselines", "bench", "bench-models", "bench-sites", "paper", "ablations"]
)
def test_it_is_built_from_the_shipped_grids(name: str, tmp_path: Path) -> None:
    sweep = load_sweep(ROOT / "config" / f"{name}.yaml")
    synthetic.write_sweep(tmp_path / "results", sweep)
    build_paper(sweep, tmp_path / "results", MANUSCRIPT, tmp_path / "paper")
    made = contents(tmp_path / "paper")
    numbers = json.loads(made["numbers.json"])
    assert numbers["counts"]["saes"] == str(len(list(sweep.cells())))
    assert numbers["sanity"]["won"] == numbers["sanity"]["total"] != "0"
    kinds = [change.kind for change in changes(sweep)]
    methods, models = kinds.count("method"), len(sweep.models)
    assert len(rows(made, "ablations")) == methods * models
    assert len(rows(made, "sensitivity")) == (len(kinds) - methods) * models
    if name == "bench":
        assert {b["name"] for b in numbers["abstract"]["baselines"]} == {
            "batchtopk",
            "topk",
            "jumprelu",
        }


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    def result(l0: float) -> Result:
        record = synthetic.evaluation("m", l0)
        record["phases"]["phase1"] |= {"l0": l0, "mse": l0**-0.5}
        return Result(f"m/{l0:g}", record, {})

    slopes = frontier_slopes([result(l0) for l0 in (4, 8, 16)])
    assert slopes == pytest.approx({"m/4": 2.0, "m/8": 2.0, "m/16": 2.0})


def test_cost_comes_from_the_benchmarks_of_the_workflow(built: dict[str, bytes]) -> None:
    row = rows(built, "cost")[0]
    assert row[:3] == ["tiny", "spalf", "8"]
    assert row[5:] == ["1.5 ± 0.0", "–", "–", "–", "812 ± 0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ΔCE ± 3 %", r"$\Delta$CE $\pm$ 3 \%"),
        ("−0.1_a & b", r"$-$0.1\_a \& b"),
        ("∫v² of λ", r"$\int v^2$ of $\lambda$"),
        ("d · mean cos²", r"d $\cdot$ mean $\cos^2$"),
        ("a\\b^c", r"a\textbackslash{}b\textasciicircum{}c"),
    ],
)
def test_latex_of_a_cell(text: str, expected: str) -> None:
    assert latex(text) == expected


def test_numbers_that_are_not_there_are_dashes() -> None:
    assert number(None) == number(float("nan")) == spread([None]) == "–"
    assert spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert number(-0.5, ".1f") == "−0.5"
    assert number(12.0, "d") == "12"


@pytest.mark.parametrize("name", ["results", "results-sensitivity"])
def test_pages_of_results_are_in_step_with_the_files_they_are_written_from(name: str) -> None:
    docs = ROOT / "docs"
    remedy = f"run python -m workflow.scripts.write_results_page results/paper --name {name}"
    page = (docs / f"{name}.md").read_text(encoding="utf-8")
    assert page == results_page(docs / name, f"images/{name}"), remedy
    pictures = re.findall(rf"\((images/{name}/[^)]+)\)", page)
    assert len(pictures) >= 5
    assert {(docs / picture) for picture in pictures} == set((docs / "images" / name).iterdir())
    built = json.loads((docs / name / "numbers.json").read_text(encoding="utf-8"))["built"]
    assert f"commit `{built['commit']}`" in page and built["machine"] in page


def test_the_page_of_results_is_written_by_a_command(
    built: dict[str, bytes], place: Path, tmp_path: Path
) -> None:
    page = write(place / "one" / "out", tmp_path).read_text(encoding="utf-8")
    assert page.replace("images/results/", "figures/") == built["results.md"].decode()
    assert "This is the demo" not in page  # another grid
    for picture in re.findall(r"\((images/results/[^)]+)\)", page):
        assert (tmp_path / picture).exists()


def test_it_is_made_on_demand_and_the_partial_one_trains_nothing(finished: Sweep) -> None:
    assert finished.planned() == {}
    assert finished.planned("--", "paper") == {"paper": 1}
    cell = finished.directory / "results/tiny/L0_4/seed_0"
    (cell / "evaluation.json").unlink()
    assert finished.planned("--", "paper") == {"evaluate": 1, "paper": 1}
    assert finished.planned("--", "paper_partial") == {"paper_partial": 1}


def test_seeds_are_compared_for_the_paper_only(finished: Sweep) -> None:
    finished.configure(grid={"L0_target": [4, 8], "seed": [0, 1]})
    assert "consistency" not in finished.planned()
    assert finished.planned("--", "paper")["consistency"] == 2
    assert finished.run("--quiet", "all", "--", "paper").returncode == 0
    calls = [call for call in finished.calls() if call[0] == "consistency"]
    assert len(calls) == 2
    out = "results/tiny/L0_8/consistency.json"
    (call,) = [call for call in calls if out in call]
    saes = [f"results/tiny/L0_8/seed_{seed}/phase2" for seed in (0, 1)]
    assert call[-2:] == saes


@pytest.mark.timeout(300)
def test_keep_going_past_failed_cells_makes_the_paper_of_the_others(sweep: Sweep) -> None:
    done = sweep.run("--keep-going", "--", "paper", STUB_FAIL="phase1", STUB_FAIL_AT="L0_4")
    assert done.returncode == 1
    assert "results/paper_partial/paper.pdf" in done.stdout
    assert (sweep.directory / "results/paper_partial/paper.pdf").exists()
    assert not (sweep.directory / "results/paper/paper.pdf").exists()
    (call,) = [call for call in sweep.calls() if call[0] == "paper"]
    assert "--partial" in call
    # The rule's own record is kept: nothing is left to do until a result is added.
    assert sweep.planned("--", "paper_partial") == {}
    assert sweep.run("--quiet", "all", "--", "paper").returncode == 0
    assert (sweep.directory / "results/paper/paper.pdf").exists()
    assert sweep.planned("--", "paper_partial") == {"paper_partial": 1}


def test_other_targets_that_fail_make_no_paper(sweep: Sweep) -> None:
    done = sweep.run("--keep-going", STUB_FAIL="phase1", STUB_FAIL_AT="L0_4")
    assert done.returncode == 1
    assert not [call for call in sweep.calls() if call[0] == "paper"]


@pytest.mark.parametrize("name", ["bench", "paper"])
def test_the_paper_of_a_shipped_grid_is_planned(sweep: Sweep, name: str) -> None:
    shipped = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8"))
    (sweep.directory / "config.yaml").write_text(yaml.safe_dump(shipped), encoding="utf-8")
    planned = sweep.planned("--", "paper")
    assert planned["paper"] == 1
    cells = list(load_sweep(ROOT / "config" / f"{name}.yaml").cells())
    assert planned["consistency"] == len(cells) // len(shipped["grid"]["seed"])
