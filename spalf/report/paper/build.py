"""From the results of a sweep to a manuscript: numbers, tables and figures, then a PDF by Typst."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spalf.config import SweepConfig
from spalf.errors import UserError
from spalf.report.aggregate import aggregate
from spalf.report.files import replacing
from spalf.report.paper import comparisons, figures, numbers, tables
from spalf.report.paper.comparisons import Change, Consistency
from spalf.report.paper.page import results_page
from spalf.report.paper.results import (
    Result,
    as_table,
    is_evaluation,
    read_consistency,
    read_results,
)
from spalf.report.paper.sheet import Sheet
from spalf.report.tables import write_tables

MANUSCRIPT = "manuscript.typ"
PAGE = "results.md"
DATE = 0
"""Seconds since 1970 in the PDF: a date of its own would make every build another file."""


@dataclass(frozen=True)
class Paper:
    """What was built.

    Attributes:
        pdf: the manuscript.
        outputs: every file that was written.
        inputs: every file that was read.
    """

    pdf: Path
    outputs: Sequence[Path]
    inputs: Sequence[Path]


@dataclass(frozen=True)
class _Material:
    """Everything that a build has read.

    Attributes:
        sweep: the grid.
        root: directory of the results.
        results: evaluations, in the order of the grid.
        table: the same, one row an SAE.
        consistency: agreement of seeds, where it was measured.
        missing: results of the grid that are not there.
        expected: how many there should be.
    """

    sweep: SweepConfig
    root: Path
    results: Sequence[Result]
    table: pd.DataFrame
    consistency: Consistency
    missing: Sequence[str]
    expected: int

    @property
    def note(self) -> str:
        """What figures made of evaluations say where some are missing."""
        missing = sum(is_evaluation(name) for name in self.missing)
        return _incomplete(missing, missing + len(self.results), "evaluations")

    @property
    def note_on_seeds(self) -> str:
        """The same of comparisons of seeds."""
        missing = sum(not is_evaluation(name) for name in self.missing)
        return _incomplete(missing, missing + len(self.consistency), "comparisons")

    @property
    def inputs(self) -> list[Path]:
        """The files that were read."""
        cells = [self.root / result.place for result in self.results]
        found = [cell / "evaluation.json" for cell in cells]
        found += [path for cell in cells for path in sorted((cell / "benchmarks").glob("*.tsv"))]
        found += [path for cell in cells for path in _logs(cell)]
        return found + [self.root / _compared(*key) for key in self.consistency]


def _incomplete(missing: int, expected: int, what: str) -> str:
    return f"incomplete: {missing} of {expected} {what} are missing" if missing else ""


def build_paper(
    sweep: SweepConfig,
    results: Path,
    manuscript: Path,
    out: Path,
    *,
    partial: bool = False,
    config: str = "",
) -> Paper:
    """Write ``paper.pdf`` into ``out``, and everything it is made of.

    That is ``numbers.json``, ``tables/*.{csv,tex}``, ``figures/*.{pdf,png}`` and a copy of the
    manuscript, which reads them; ``results.md`` is the same as a page. Equal inputs give equal
    bytes.

    Args:
        sweep: the grid; its cells are what the paper is about.
        results: directory of the results.
        manuscript: the Typst source.
        out: directory to write; what the last build left there is replaced.
        partial: build from the results that are there; those that are not are marked and listed.
        config: names of the configuration files of the sweep, for the first page.

    Raises:
        UserError: a result is missing and ``partial`` is false, all are, one is damaged, or Typst
            is not installed or cannot compile the manuscript.
    """
    _require_typst()
    read = _read(sweep, results, partial)
    for part in ("tables", "figures"):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir(parents=True)
    compared, found = comparisons.ratios(read.table), comparisons.changes(sweep)
    sanity = comparisons.against_random(read.table, read.results, read.consistency)
    _write_tables(read, compared, found, sanity.sheet, out / "tables")
    content = {
        "built": numbers.built(read.results, config),
        "grid": numbers.grid(sweep),
        "counts": numbers.counts(sweep, read.table, read.expected, read.missing),
        "abstract": numbers.abstract(read.table, compared, read.consistency),
        "sanity": numbers.sanity(sanity),
        "probing": numbers.probing(read.table),
        "figures": _draw(read, compared, found, out / "figures"),
    }
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    with replacing(out / "numbers.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(manuscript, out / MANUSCRIPT)
    pdf = compile_manuscript(out)
    with replacing(out / PAGE) as temporary:
        temporary.write_text(results_page(out, "figures"), encoding="utf-8")
    outputs = [out / "numbers.json", out / MANUSCRIPT, out / PAGE, pdf]
    outputs += [path for part in ("tables", "figures") for path in _files(out / part)]
    return Paper(pdf, outputs, [manuscript, *read.inputs])


def compile_manuscript(folder: Path) -> Path:
    """Compile ``manuscript.typ`` of ``folder`` to ``paper.pdf``, with Typst's own fonts only.

    Raises:
        UserError: Typst refuses it; the message is Typst's.
    """
    import typst

    source, pdf = folder / MANUSCRIPT, folder / "paper.pdf"
    try:
        made = typst.compile(
            str(source), root=str(folder), format="pdf", ignore_system_fonts=True, timestamp=DATE
        )
    except typst.TypstError as error:
        raise UserError(str(source), None, f"Typst cannot compile it: {error}") from None
    with replacing(pdf) as temporary:
        temporary.write_bytes(made)
    return pdf


def _require_typst() -> None:
    try:
        import typst  # noqa: F401
    except ImportError:
        raise UserError("typst", None, "is not installed; pip install 'spalf[paper]'") from None


def _read(sweep: SweepConfig, root: Path, partial: bool) -> _Material:
    places = [cell.place for cell in sweep.cells()]
    places += sorted(
        path.parent.relative_to(root).as_posix()
        for model in sweep.models
        for path in (root / model / "imported").glob("*/evaluation.json")
    )
    compared = _comparisons(sweep)
    files = [f"{place}/evaluation.json" for place in places]
    files += [_compared(*key) for key in compared]
    missing = [name for name in files if not (root / name).exists()]
    there = [place for place in places if f"{place}/evaluation.json" not in missing]
    if not there or (missing and not partial):
        listed = f"{missing[0]} and {len(missing) - 1} more" if missing[1:] else missing[0]
        remedy = f"{listed}: not there; run the steps, or build with what there is (--partial)"
        raise UserError("results", str(root), remedy)
    results = read_results(root, there)
    consistency = {
        key: read_consistency(root / _compared(*key))
        for key in compared
        if _compared(*key) not in missing
    }
    table = as_table(results)
    return _Material(sweep, root, results, table, consistency, missing, len(files))


def _comparisons(sweep: SweepConfig) -> list[tuple[str, str, float]]:
    """Model, line and L0 target of each comparison of seeds; none if there is one seed."""
    if len(sweep.grid.seed) < 2:
        return []
    keys = [(cell.model, cell.variant or cell.method, cell.L0_target) for cell in sweep.cells()]
    return list(dict.fromkeys(keys))


def _compared(model: str, line: str, target: float) -> str:
    series = model if line == "spalf" else f"{model}/{line}"
    return f"{series}/L0_{target:g}/consistency.json"


def _write_tables(
    read: _Material,
    compared: pd.DataFrame,
    found: Sequence[Change],
    sanity: Sheet,
    folder: Path,
) -> None:
    """Every table of the manuscript, and below ``data`` all numbers as they are."""
    data = folder / "data"
    aggregate([read.root / result.place / "evaluation.json" for result in read.results], data)
    write_tables(sorted(data.glob("*.csv")), data)
    saes = data / "saes.csv"
    read.table.to_csv(saes, index=False, float_format="%.6g", lineterminator="\n")
    sweep, table = read.sweep, read.table
    sizes = {cell.model: sweep.run_config(cell).batch_size for cell in sweep.cells()}
    plain = table[table["variant"] == ""]
    lines = {(model, line) for model, line in zip(plain["model"], plain["line"], strict=True)}
    for sheet in (
        tables.frontier_sheet(plain),
        tables.phases_sheet(table),
        tables.control_sheet(table),
        comparisons.comparison_sheet(compared),
        comparisons.best_baseline_sheet(table),
        *comparisons.variant_sheets(compared, found),
        sanity,
        tables.probing_sheet(plain),
        tables.dictionary_sheet(plain, read.results),
        tables.consistency_sheet({k: v for k, v in read.consistency.items() if k[:2] in lines}),
        tables.drift_sheet(table),
        *tables.absorption_sheets(plain, read.results),
        tables.cost_sheet(plain, sizes),
        tables.settings_sheet(read.results),
        tables.missing_sheet(read.missing),
    ):
        sheet.write(folder)


def _draw(
    read: _Material, compared: pd.DataFrame, found: Sequence[Change], folder: Path
) -> dict[str, Any]:
    """Draw every figure; the names of the PDF files below the manuscript, by what they show."""
    table, results, note = read.table, read.results, read.note
    ours = [result for result in results if result.line == "spalf"]
    courses: list[Path] = []
    for model in dict.fromkeys(str(result.cell["model"]) for result in ours):
        logs = _logs_by_cell(read.root, [r for r in ours if r.cell["model"] == model])
        if logs:
            courses += figures.course_figure(model, logs, folder / f"course_{model}", note)
    constants = [change for change in found if change.kind == "constant"]
    ablations = [change for change in found if change.kind == "method"]
    usual = read.sweep.train.lr
    drawn = {
        "pareto": figures.pareto_figure(table, folder / "pareto", note),
        "sweep": figures.sweep_figure(results, folder / "sweep", note),
        "ablations": figures.variants_figure(compared, ablations, folder / "ablations", note),
        "constants": figures.variants_figure(compared, constants, folder / "constants", note),
        "rates": figures.rate_figure(table, found, usual, folder / "rates", note),
        "courses": courses,
        "elasticity": figures.elasticity_figure(table, folder / "elasticity", note),
        "consistency": figures.consistency_figure(
            read.consistency, table, folder / "consistency", read.note_on_seeds
        ),
        "probing": figures.probing_figure(table, folder / "probing", note),
        "neighbours": figures.neighbour_figure(results, folder / "neighbours", note),
    }
    return {
        name: [f"figures/{path.name}" for path in paths if path.suffix == ".pdf"]
        for name, paths in drawn.items()
    }


def _logs_by_cell(
    root: Path, results: Sequence[Result]
) -> Mapping[tuple[float, int], Sequence[Path]]:
    logs = {
        (float(r.cell["L0_target"]), int(r.cell["seed"])): _logs(root / r.place) for r in results
    }
    return {key: paths for key, paths in logs.items() if paths}


def _logs(cell: Path) -> list[Path]:
    paths = [cell / phase / "metrics.jsonl" for phase in ("phase1", "phase2")]
    return [path for path in paths if path.exists()]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
