"""Where results come from, as the commands that make them write it down."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from spalf.cli.main import spalf
from spalf.cli.provenance import describe_provenance
from spalf.config import parse_sweep
from spalf.errors import UserError
from tests.workflow import synthetic
from tests.workflow.conftest import SMALL
from workflow import steps

SWEEP = parse_sweep({**SMALL, "methods": ["spalf"]}, "test")
CELLS = [cell.place for cell in SWEEP.cells()]
EVALUATIONS = [f"results/{place}/evaluation.json" for place in CELLS]


def call(*arguments: str) -> str:
    done = CliRunner().invoke(spalf, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and figures of a small sweep, made as the workflow makes them."""
    directory = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        make()
    return directory


@pytest.fixture
def made(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, to be changed freely, as the working directory."""
    shutil.copytree(made_once, tmp_path / "sweep")
    monkeypatch.chdir(tmp_path / "sweep")
    return tmp_path / "sweep"


def make() -> None:
    synthetic.write_sweep(Path("results"), SWEEP)
    for name in EVALUATIONS:
        record = json.loads(Path(name).read_text(encoding="utf-8"))
        record |= {"environment": {"commit": "abc1234", "device": "a GPU", "torch": "2.13.0"}}
        Path(name).write_text(json.dumps(record), encoding="utf-8")

    def said(rule: str) -> str:
        return steps.origin(rule, ["my grid.yaml"], {"dataset": "x"}, SWEEP)

    call("aggregate", "--out", "results/tables", "--workflow", said("aggregate"), *EVALUATIONS)
    tables = ["results/tables/frontier.csv", "results/tables/phases.csv"]
    call("tables", "--out", "results/tables", *tables)
    drawn = ["--frontier", tables[0], "--settings", steps.sweep_settings(SWEEP)]
    call("figures", "--out", "results/figures", f"--workflow={said('figures')}", *drawn)


def test_a_figure_says_everything_about_its_making(made: Path) -> None:
    found = describe_provenance(Path("results/figures/pareto.pdf"))
    assert found["state"] == "as made"
    words = shlex.split(found["command"])
    assert words[:4] == ["spalf", "figures", "--frontier", "results/tables/frontier.csv"] or (
        words[:4] == ["spalf", "figures", "--out", "results/figures"]
    )
    assert not [word for word in words if word.startswith("--workflow")]
    assert shlex.split(found["again"]) == [
        *("snakemake", "--configfile", "my grid.yaml", "--config", 'dataset="x"'),
        *("--force", "--", "figures"),
    ]
    assert found["configfiles"] == ["my grid.yaml"]
    assert found["settings"]["grid"]["L0_target"] == [4, 8]
    assert {"python", "spalf", "matplotlib"} <= found["versions"].keys()
    assert (
        found["commit"]
        == json.loads(Path("results/figures/provenance/figures.json").read_text(encoding="utf-8"))[
            "commit"
        ]
    )


def test_inputs_are_followed_to_the_evaluations_and_what_made_them(made: Path) -> None:
    inputs = describe_provenance(Path("results/figures/pareto.png"))["inputs"]
    by_path = {entry["path"]: entry for entry in inputs}
    assert by_path["results/tables/frontier.csv"]["command"].startswith("spalf aggregate")
    for name in EVALUATIONS:
        assert by_path[name]["of"] == "results/tables/frontier.csv"
        assert by_path[name]["commit"] == "abc1234"
    assert {entry["state"] for entry in inputs} == {"unchanged"}


@pytest.mark.parametrize(
    "name",
    [
        "results/tables/frontier.csv",
        "results/tables/phases.tex",
        "results/tables/frontier.md",
        "results/figures/control_tiny.pdf",
        "results/figures/control_tiny.png",
    ],
)
def test_every_table_and_figure_has_a_record(made: Path, name: str) -> None:
    found = describe_provenance(Path(name))
    assert found["state"] == "as made"
    assert found["inputs"] and found["command"].startswith("spalf ")


def test_without_a_workflow_the_command_itself_makes_it_again(made: Path) -> None:
    found = describe_provenance(Path("results/tables/frontier.tex"))
    assert found["again"] == found["command"]
    assert found["command"].startswith("spalf tables --out results/tables")


def test_a_change_since_then_is_told(made: Path) -> None:
    evaluation = Path(EVALUATIONS[0])
    evaluation.write_text(evaluation.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    Path("results/tables/phases.csv").unlink()
    with Path("results/figures/pareto.pdf").open("ab") as file:
        file.write(b"x")
    found = describe_provenance(Path("results/figures/pareto.pdf"))
    assert found["state"] == "changed since it was made"
    states = {entry["path"]: entry["state"] for entry in found["inputs"]}
    assert states[EVALUATIONS[0]] == "changed since"
    assert describe_provenance(Path("results/tables/phases.csv"))["state"] == "missing"


def test_an_evaluation_speaks_for_itself(made: Path) -> None:
    found = describe_provenance(Path(EVALUATIONS[0]))
    assert found["commit"] == "abc1234"
    assert found["versions"] == {"device": "a GPU", "torch": "2.13.0"}
    # Of the sweep around it, as the tables have it.
    sweep = ["--configfile", "my grid.yaml", "--config", 'dataset="x"']
    assert shlex.split(found["again"]) == ["snakemake", *sweep, "--force", "--", EVALUATIONS[0]]
    shutil.rmtree("results/tables")
    alone = describe_provenance(Path(EVALUATIONS[0]))["again"]
    assert shlex.split(alone) == ["snakemake", "--force", "--", EVALUATIONS[0]]


@pytest.mark.parametrize(
    ("name", "words"),
    [("results/nothing.pdf", "no such file"), ("results/tables/mine.txt", "nothing is recorded")],
)
def test_a_file_without_a_record_is_one_line(made: Path, name: str, words: str) -> None:
    Path("results/tables/mine.txt").touch()
    with pytest.raises(UserError, match=words):
        describe_provenance(Path(name))


def test_the_command_prints_lines_or_json(made: Path) -> None:
    text = call("provenance", "results/figures/pareto.pdf")
    lines = text.splitlines()
    assert lines[0] == "results/figures/pareto.pdf"
    for name in ("state", "made by", "again", "config", "settings", "commit", "versions"):
        if name != "commit" or describe_provenance(Path("results/figures/pareto.pdf"))["commit"]:
            assert any(line.startswith(f"  {name} ") for line in lines), name
    assert f"  input     {EVALUATIONS[0]}  unchanged  commit abc1234" in lines
    found = json.loads(call("provenance", "--json", "results/figures/pareto.pdf"))
    assert found == describe_provenance(Path("results/figures/pareto.pdf"))


def test_a_record_depends_on_nothing_but_the_inputs(made: Path) -> None:
    path = Path("results/tables/provenance/tables.json")
    before = path.read_bytes()
    tables = ["results/tables/frontier.csv", "results/tables/phases.csv"]
    call("tables", "--out", "results/tables", *tables)
    assert path.read_bytes() == before


def test_damaged_records_are_passed_over(made: Path) -> None:
    Path("results/tables/provenance/tables.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="nothing is recorded"):
        describe_provenance(Path("results/tables/frontier.tex"))
    assert describe_provenance(Path("results/tables/frontier.csv"))["state"] == "as made"
