"""From the results of a sweep to a manuscript: numbers, tables and figures, then a PDF by Typst."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from spalf.config import SweepConfig
from spalf.errors import UserError
from spalf.report import paper_tables as sheets
from spalf.report.aggregate import aggregate
from spalf.report.figures import pareto_figures
from spalf.report.paper_figures import course_figure, sweep_figure
from spalf.report.paper_tables import Result, Sheet, number
from spalf.report.records import read_evaluation, read_frontier
from spalf.report.tables import write_tables

MANUSCRIPT = "manuscript.typ"
DATE = 0
"""Seconds since 1970 in the PDF: a date of its own would make every build another file."""

_SOFTWARE = ("commit", "device", "python")
_TRAINING = ("init", "phase1", "phase2", "baseline")


def build_paper(
    sweep: SweepConfig, results: Path, manuscript: Path, out: Path, *, partial: bool = False
) -> Path:
    """Write ``paper.pdf`` into ``out``, and everything it is made of.

    That is ``numbers.json``, ``tables/*.{csv,tex}``, ``figures/*.{pdf,png}`` and a copy of the
    manuscript, which reads them. Equal inputs give equal bytes.

    Args:
        sweep: the grid; its cells are what the paper is about.
        results: directory of the results.
        manuscript: the Typst source.
        out: directory to write; what the last build left there is replaced.
        partial: build from the cells that are there; those that are not are marked and listed.

    Returns:
        The path of the PDF.

    Raises:
        UserError: a cell is missing and ``partial`` is false, all are, an evaluation is damaged,
            or Typst is not installed or cannot compile the manuscript.
    """
    _require_typst()
    expected = [cell.place for cell in sweep.cells()]
    expected += sorted(
        path.parent.relative_to(results).as_posix()
        for model in sweep.models
        for path in (results / model / "imported").glob("*/evaluation.json")
    )
    missing = [place for place in expected if not (results / place / "evaluation.json").exists()]
    found = _read(results, [place for place in expected if place not in missing])
    if not found or (missing and not partial):
        listed = f"{missing[0]} and {len(missing) - 1} more" if missing[1:] else missing[0]
        remedy = f"{listed}: no evaluation.json; run them, or build with what is there (--partial)"
        raise UserError("results", str(results), remedy)
    for part in ("tables", "figures"):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir(parents=True)
    note = f"{len(missing)} of {len(expected)} SAEs missing" if missing else ""
    frontier = _tables(sweep, results, found, missing, out / "tables")
    drawn = _figures(found, results, out, note)
    numbers = _numbers(sweep, found, missing, frontier) | {"figures": drawn}
    text = json.dumps(numbers, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "numbers.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(manuscript, out / MANUSCRIPT)
    return compile_manuscript(out)


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
    temporary = pdf.with_name(f".{pdf.name}")
    temporary.write_bytes(made)
    temporary.replace(pdf)
    return pdf


def _require_typst() -> None:
    try:
        import typst  # noqa: F401
    except ImportError:
        raise UserError("typst", None, "is not installed; pip install 'spalf[paper]'") from None


def _read(results: Path, places: Iterable[str]) -> list[Result]:
    found = []
    for place in places:
        path = results / place / "evaluation.json"
        read_evaluation(path)  # says what is wrong with it, if anything is
        data = json.loads(path.read_text(encoding="utf-8"))
        found.append(Result(place, data, _seconds(results / place / "benchmarks")))
    return found


def _seconds(benchmarks: Path) -> float | None:
    """What Snakemake's benchmarks of the training steps add up to; none if there are none."""
    times = []
    for step in _TRAINING:
        path = benchmarks / f"{step}.tsv"
        if path.exists():
            column = pd.to_numeric(pd.read_csv(path, sep="\t")["s"], errors="coerce")
            times.append(float(column.sum()))
    return sum(times) if times else None


def _tables(
    sweep: SweepConfig, results: Path, found: Sequence[Result], missing: list[str], folder: Path
) -> pd.DataFrame:
    """Write every table; the frontier's full one comes back."""
    paths = [results / result.place / "evaluation.json" for result in found]
    data = folder / "data"
    frontier, _ = aggregate(paths, data)
    write_tables(sorted(data.glob("*.csv")), data)
    table = read_frontier(frontier)
    batch_size = {
        cell.model: sweep.run_config(cell).batch_size for cell in sweep.cells() if not cell.variant
    }
    made: tuple[Sheet, ...] = (
        sheets.frontier_sheet(found),
        sheets.phases_sheet(found),
        sheets.control_sheet(found),
        sheets.comparison_sheet(table),
        sheets.cost_sheet(found, batch_size),
        sheets.drift_sheet(found),
        *sheets.absorption_sheets(found),
        sheets.missing_sheet(missing),
    )
    for sheet in made:
        sheet.write(folder)
    return table


def _figures(found: Sequence[Result], results: Path, out: Path, note: str) -> dict[str, Any]:
    """Draw every figure; their file names below ``out``, by what they show."""
    folder = out / "figures"
    pareto_figures(out / "tables" / "data" / "frontier.csv", folder, note)
    courses = []
    ours = [result for result in found if result.line == "spalf"]
    for model, group in groupby(ours, key=lambda result: str(result.cell["model"])):
        logs = {
            (float(result.cell["L0_target"]), int(result.cell["seed"])): paths
            for result in group
            if (paths := _logs(results / result.place))
        }
        if logs:
            course_figure(model, logs, folder, note)
            courses.append({"model": model, "file": f"figures/course_{model}.pdf"})
    sweep = "figures/sweep.pdf" if sweep_figure(found, folder, note) else ""
    return {"pareto": "figures/pareto.pdf", "courses": courses, "sweep": sweep}


def _logs(cell: Path) -> list[Path]:
    paths = [cell / phase / "metrics.jsonl" for phase in ("phase1", "phase2")]
    return [path for path in paths if path.exists()]


def _numbers(
    sweep: SweepConfig, found: Sequence[Result], missing: Sequence[str], frontier: pd.DataFrame
) -> dict[str, Any]:
    return {
        "built": _built(found),
        "grid": _grid(sweep),
        "counts": {
            "expected": str(len(found) + len(missing)),
            "found": str(len(found)),
            "missing": list(missing),
            "models": str(len(sweep.models)),
            "seeds": str(frontier["seed"].nunique()),
        },
        "abstract": _abstract(found),
        "constants": {k: f"{v:g}" for k, v in sweep.constants.model_dump().items()},
    }


def _built(found: Sequence[Result]) -> dict[str, Any]:
    """Commit, hardware and versions that the evaluations were made with."""
    environments = [result.data.get("environment", {}) for result in found]
    names = list(dict.fromkeys(name for environment in environments for name in environment))
    values = {
        name: ", ".join(dict.fromkeys(str(e[name]) for e in environments if e.get(name)))
        for name in names
    }
    packages = [[name, values[name]] for name in names if name not in _SOFTWARE and values[name]]
    packages += [["typst", version("typst")], ["matplotlib", version("matplotlib")]]
    return {name: values.get(name) or "not recorded" for name in _SOFTWARE} | {"packages": packages}


def _grid(sweep: SweepConfig) -> dict[str, Any]:
    """What was asked for, by model."""
    rows = []
    for name, entry in sweep.models.items():
        config = sweep.run_config(next(cell for cell in sweep.cells() if cell.model == name))
        sizes = (
            f"{config.total_tokens:,}",
            f"{config.batch_size:,}",
            f"{config.evaluate.tokens:,}",
        )
        shown = (str(config.F), f"{config.lr:g}", *sizes)
        rows.append([name, entry.model_name, entry.hook_point, *shown])
    return {
        "models": rows,
        "dataset": sweep.dataset.path,
        "L0_target": [f"{target:g}" for target in sweep.grid.L0_target],
        "seed": [str(seed) for seed in sweep.grid.seed],
        "methods": list(sweep.methods),
        "variants": list(sweep.variants),
        "R2_target": f"{sweep.train.R2_target:g}",
    }


def _abstract(found: Sequence[Result]) -> dict[str, str]:
    """The figures of the abstract, over SPALF's own SAEs; a dash where none apply."""
    ours = [r for r in found if r.line == "spalf"]
    final = [r.data["phases"][r.data["final"]] for r in ours]
    errors = [abs(f["l0"] / r.cell["L0_target"] - 1) for r, f in zip(ours, final, strict=True)]
    ratios = [
        p["phase2"]["delta_ce"] / p["phase1"]["delta_ce"]
        for p in (r.data["phases"] for r in ours)
        if {"phase1", "phase2"} <= set(p) and p["phase1"]["delta_ce"] > 0
    ]
    return {
        "saes": str(len(ours)),
        "l0_within": _extreme(errors, max, ".1%"),
        "ev_low": _of(final, "explained_variance", min, ".2f"),
        "ev_high": _of(final, "explained_variance", max, ".2f"),
        "ce_low": _of(final, "ce_recovered", min, ".1%"),
        "ce_high": _of(final, "ce_recovered", max, ".1%"),
        "dead_high": _of(final, "dead_fraction", max, ".1%"),
        "phase2_low": _extreme(ratios, min, ".2f"),
        "phase2_high": _extreme(ratios, max, ".2f"),
        "lambda_low": _of(_lambdas(ours), "faith", min, ".2f"),
        "lambda_high": _of(_lambdas(ours), "faith", max, ".2f"),
    }


def _lambdas(found: Sequence[Result]) -> list[Mapping[str, Any]]:
    ended = [r.data.get("controller", {}).get("phase1") or {} for r in found]
    return [phase["lambda_final"] for phase in ended if "lambda_final" in phase]


def _of(rows: Sequence[Mapping[str, Any]], name: str, choose: Any, form: str) -> str:
    return _extreme([row[name] for row in rows if row.get(name) is not None], choose, form)


def _extreme(values: Sequence[float], choose: Any, form: str) -> str:
    return number(choose(values) if values else None, form)
