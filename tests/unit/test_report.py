"""Tables and figures from evaluation files with known numbers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from spalf.errors import UserError
from spalf.report import figures
from spalf.report.aggregate import FRONTIER_COLUMNS, aggregate
from spalf.report.figures import _phase2_span, control_figure, pareto_figures
from spalf.report.paper.comparisons import best_baseline_sheet
from spalf.report.records import read_metrics
from spalf.report.tables import write_tables
from tests.workflow import synthetic

KINDS = ("md", "tex", "html")
ISSUE_COLUMNS = [
    "model",
    "hook_point",
    "method",
    "L0_target",
    "seed",
    "l0",
    "explained_variance",
    "ce_clean",
    "ce_sae",
    "delta_ce",
    "ce_recovered",
    "kl",
    "dead_fraction",
    "lambda_faith",
    "tokens",
]


@pytest.fixture
def evaluations(tmp_path: Path) -> list[Path]:
    """Two models, three sparsities, two seeds, in an order that is not the table's."""
    return [
        synthetic.write_evaluation(tmp_path / f"{model}-{target}-{seed}.json", model, target, seed)
        for model in ("wide", "narrow")
        for target in (32, 8, 16)
        for seed in (1, 0)
    ]


def test_frontier_has_one_row_per_cell_and_the_final_phase_only(
    evaluations: list[Path], tmp_path: Path
) -> None:
    frontier, phases = (pd.read_csv(path) for path in aggregate(evaluations, tmp_path / "out"))
    assert len(frontier) == 12
    assert len(phases) == 24
    assert list(frontier.columns) == list(FRONTIER_COLUMNS)
    assert set(ISSUE_COLUMNS) <= set(frontier.columns)
    row = frontier[(frontier.model == "wide") & (frontier.L0_target == 16)].iloc[0]
    expected = synthetic.metrics(16, phase2=True)
    for name in ("l0", "delta_ce", "kl", "ce_recovered"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5)
    assert row["l0_error"] == pytest.approx(0.01)
    assert set(phases.phase) == {"phase1", "phase2"}


def test_order_of_the_files_does_not_matter(evaluations: list[Path], tmp_path: Path) -> None:
    one, _ = aggregate(evaluations, tmp_path / "one")
    two, _ = aggregate(reversed(evaluations), tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert pd.read_csv(one).model.tolist() == ["narrow"] * 6 + ["wide"] * 6


def test_phase1_is_final_where_the_file_says_so(tmp_path: Path) -> None:
    record = synthetic.evaluation("m", 8)
    record["final"] = "phase1"
    (tmp_path / "e.json").write_text(json.dumps(record))
    frontier, _ = aggregate([tmp_path / "e.json"], tmp_path)
    expected = synthetic.metrics(8)["delta_ce"]
    assert pd.read_csv(frontier).delta_ce[0] == pytest.approx(expected, rel=1e-5)


def _without(*keys: str) -> str:
    record = synthetic.evaluation("m", 8)
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ('{"cell": {', "not valid JSON"),
        (_without("phases", "phase2", "kl"), "lacks phases.phase2.kl"),
        (_without("phases", "phase2"), "'phase2' is not among its phases"),
        (_without("cell", "seed"), "lacks cell.seed"),
    ],
    ids=["missing", "empty", "cut short", "metric missing", "phase missing", "cell missing"],
)
def test_damaged_evaluation_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "evaluation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        aggregate([path], tmp_path / "out")
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_cell_twice_is_refused(tmp_path: Path) -> None:
    paths = [synthetic.write_evaluation(tmp_path / f"{i}.json", "m", 8) for i in range(2)]
    with pytest.raises(UserError, match="same cell"):
        aggregate(paths, tmp_path)


def test_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one"):
        aggregate([], tmp_path)


def test_tables_hold_the_same_rows(evaluations: list[Path], tmp_path: Path) -> None:
    written = write_tables(aggregate(evaluations, tmp_path), tmp_path)
    names = {f"{table}.{kind}" for table in ("frontier", "phases") for kind in KINDS}
    assert {path.name for path in written} == names
    markdown = (tmp_path / "frontier.md").read_text(encoding="utf-8").splitlines()
    assert len(markdown) == 2 + 12
    cells = [cell.strip() for cell in markdown[2].strip("|").split("|")]
    assert cells[:6] == ["narrow", "blocks.0.hook_resid_post", "spalf", "8", "0", "8.08"]
    latex = (tmp_path / "phases.tex").read_text(encoding="utf-8")
    assert latex.count(r"\\") == 1 + 24
    assert r"\toprule" in latex
    assert r"blocks.0.hook\_resid\_post" in latex
    assert r"\begin{tabular}{llllrr" in latex
    page = (tmp_path / "frontier.html").read_text(encoding="utf-8")
    shown = re.findall(r"<td>(.*?)</td>", page)
    assert shown[: len(cells)] == cells and len(shown) == 12 * len(cells)
    assert "tr > :nth-child(4), tr > :nth-child(5)" in page  # numbers stand to the right


def test_missing_standard_error_is_a_dash_not_nan(tmp_path: Path) -> None:
    record = synthetic.evaluation("m", 8)
    record["phases"]["phase2"] |= {"kl_se": None, "l0_se": None}
    (tmp_path / "e.json").write_text(json.dumps(record))
    write_tables(aggregate([tmp_path / "e.json"], tmp_path), tmp_path)
    assert "nan" not in (tmp_path / "frontier.md").read_text(encoding="utf-8").lower()


@pytest.fixture
def with_baselines(evaluations: list[Path], tmp_path: Path) -> list[Path]:
    """The same with a baseline, which has one phase and no multiplier, and a variant."""
    settings = {"k": 8.0, "lr_tried": [1e-3, 3e-3]}
    for target in (8, 16, 32):
        path = tmp_path / f"batchtopk-{target}.json"
        cell = {"method": "batchtopk", "lr": 3e-3, "hyperparameters": settings}
        content = synthetic.evaluation("wide", target, **cell)
        only = {**content["phases"]["phase1"], "lambda_faith": None, "train_tokens": None}
        path.write_text(json.dumps({**content, "phases": {"sae": only}, "final": "sae"}))
        varied = tmp_path / f"variant-{target}.json"
        synthetic.write_evaluation(varied, "wide", target, variant="no-capu", lr=1e-3)
        evaluations += [path, varied]
    return evaluations


def test_baselines_and_variants_are_rows_of_the_same_table(
    with_baselines: list[Path], tmp_path: Path
) -> None:
    frontier, phases = (pd.read_csv(path) for path in aggregate(with_baselines, tmp_path / "out"))
    assert len(frontier) == 12 + 3 + 3
    assert len(phases) == 24 + 3 + 6
    baseline = frontier[frontier.method == "batchtopk"]
    assert (baseline.lr == 3e-3).all()
    assert (baseline.hyperparameters == "k=8, lr_tried=0.001 0.003").all()
    assert baseline.lambda_faith.isna().all()
    assert sorted(frontier[frontier.variant == "no-capu"].L0_target) == [8, 16, 32]
    assert set(phases[phases.method == "batchtopk"].phase) == {"sae"}


def test_columns_that_say_nothing_are_left_out_of_the_tables(
    evaluations: list[Path], with_baselines: list[Path], tmp_path: Path
) -> None:
    plain, full = tmp_path / "plain", tmp_path / "full"
    only_spalf = [path for path in evaluations if path.stem.count("-") == 2]
    write_tables(aggregate(only_spalf, plain), plain)
    write_tables(aggregate(with_baselines, full), full)
    head = (plain / "frontier.md").read_text(encoding="utf-8").splitlines()[0]
    assert not [name for name in ("variant", " lr ", "hyper") if name in head]
    head = (full / "frontier.md").read_text(encoding="utf-8").splitlines()[0]
    assert all(name in head for name in ("variant", " lr ", "hyper-parameters"))
    latex = (full / "frontier.tex").read_text(encoding="utf-8")
    assert "no-capu" in latex
    assert "lr_tried" not in latex


def test_pareto_has_a_line_for_each_method_and_variant(
    with_baselines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: drawn.append(figure) or [])
    frontier, _ = aggregate(with_baselines, tmp_path)
    pareto_figures(frontier, tmp_path)
    panel = next(axes for axes in drawn[0].axes if axes.get_title() == "wide")
    labels = panel.get_legend_handles_labels()[1]
    assert labels == ["spalf", "spalf, no-capu", "batchtopk"]
    assert len(panel.containers) == 3
    colours = {container.lines[0].get_color() for container in panel.containers}
    assert len(colours) == 3


def test_random_saes_and_very_many_variants_are_left_to_the_tables(
    evaluations: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: drawn.append(figure) or [])
    for index in range(figures.MOST_LINES):
        path = tmp_path / f"variant-{index}.json"
        evaluations.append(synthetic.write_evaluation(path, "wide", 8, variant=f"v{index}"))
    path = tmp_path / "random.json"
    evaluations.append(synthetic.write_evaluation(path, "wide", 8, method="random"))
    for given in (evaluations[:-1], evaluations[:14] + evaluations[-1:]):
        pareto_figures(aggregate(given, tmp_path)[0], tmp_path)
    for figure, expected in zip(
        drawn, (["spalf"], ["spalf", "spalf, v0", "spalf, v1"]), strict=True
    ):
        panel = next(axes for axes in figure.axes if axes.get_title() == "wide")
        assert panel.get_legend_handles_labels()[1] == expected
    assert "random" in pd.read_csv(tmp_path / "frontier.csv")["method"].tolist()


def test_figures_depend_on_the_data_alone(evaluations: list[Path], tmp_path: Path) -> None:
    frontier, _ = aggregate(evaluations, tmp_path)
    first = [path.read_bytes() for path in pareto_figures(frontier, tmp_path / "one")]
    second = [path.read_bytes() for path in pareto_figures(frontier, tmp_path / "two")]
    assert first == second
    assert first[0].startswith(b"%PDF")
    assert first[1].startswith(b"\x89PNG")
    assert b"CreationDate" not in first[0]


def test_pareto_survives_one_cell_and_a_negative_delta_ce(tmp_path: Path) -> None:
    record = synthetic.evaluation("m", 8)
    record["phases"]["phase2"]["delta_ce"] = -0.001
    (tmp_path / "e.json").write_text(json.dumps(record))
    frontier, _ = aggregate([tmp_path / "e.json"], tmp_path)
    assert all(path.stat().st_size > 5000 for path in pareto_figures(frontier, tmp_path))


def test_frontier_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "frontier.csv").write_text(",".join(FRONTIER_COLUMNS) + "\n")
    with pytest.raises(UserError, match="no rows"):
        pareto_figures(tmp_path / "frontier.csv", tmp_path)


def _metrics(root: Path, targets: tuple[int, ...] = (8, 16)) -> list[Path]:
    return [
        synthetic.write_metrics(
            root / f"L0_{target}" / "seed_0" / f"phase{phase}" / "metrics.jsonl", target, phase
        )
        for target in targets
        for phase in (1, 2)
    ]


def test_control_figure_is_drawn_and_repeats(tmp_path: Path) -> None:
    logs = _metrics(tmp_path)
    one = control_figure("demo", logs, tmp_path / "one")
    assert [path.name for path in one] == ["control_demo.pdf", "control_demo.png"]
    two = control_figure("demo", logs, tmp_path / "two")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_phase2_span_starts_where_phase1_ended(tmp_path: Path) -> None:
    logs = [read_metrics(path) for path in _metrics(tmp_path, (8,))]
    assert _phase2_span([pd.concat(logs)]) == (1930 * 1024, 1990 * 1024)
    assert _phase2_span(logs[:1]) == (None, 1930 * 1024)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ('{"step": 1', "metrics.jsonl:1"), ('{"step": 1}\n', "lacks tokens")],
    ids=["empty", "cut short", "columns missing"],
)
def test_damaged_metrics_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = _metrics(tmp_path)[0]
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        control_figure("demo", [path], tmp_path)


def test_report_imports_no_torch() -> None:
    probe = "import sys, spalf.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0


def test_the_best_baseline_is_read_off_its_own_curve_at_our_l0() -> None:
    """Two baselines that cross; SPALF lands 1 % above the last target of one of them."""
    rows = [
        ("spalf", "spalf", 16, 16.0, 0.10, 0.90),
        ("spalf", "spalf", 64, 64.64, 0.031, 0.96),
        ("spalf", "long", 64, 64.64, 0.02, 0.95),
        ("spalf", "long", 16, 16.0, -0.03, 0.88),
        ("one", "one", 16, 16.0, 0.16, 0.89),
        ("one", "one", 64, 64.0, 0.04, 0.96),
        ("two", "two", 16, 16.0, 0.12, 0.91),
        ("two", "two", 64, 64.0, 0.06, 0.97),
        ("random", "random", 16, 16.0, 0.01, 0.99),
    ]
    columns = ["method", "line", "L0_target", "l0", "delta_ce", "explained_variance"]
    table = pd.DataFrame(rows, columns=columns)
    table["phase1_explained_variance"] = table["explained_variance"] + 0.01
    table["variant"] = ["long" if line == "long" else "" for line in table["line"]]
    table = table.assign(model="m", seed=0, l0_error=0.01, dead_fraction=0.002)
    found = {row[1:3]: row for row in best_baseline_sheet(table).rows}
    assert found.keys() == {("spalf", "16"), ("spalf", "64"), ("long", "16"), ("long", "64")}
    assert found["long", "16"][7:10] == ("two", "0.1200", "−0.250"), "below the model's own loss"
    assert found["spalf", "16"][7:10] == ("two", "0.1200", "0.833")
    there = 0.04 * 1.01**-1  # one's slope in log-log is −1
    assert found["spalf", "64"][7:10] == ("one", f"{there:.4f}", f"{0.031 / there:.3f}")
    assert found["long", "64"][9] == f"{0.02 / there:.3f}"
    best_variance = 0.97 + 0.06 * math.log(1.01) / math.log(4)
    assert found["spalf", "64"][11] == f"+{0.97 - best_variance:.4f}".replace("+-", "−")
