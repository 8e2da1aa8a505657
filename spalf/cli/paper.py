"""``spalf paper``: a manuscript whose every number, table and figure comes from the results."""

from __future__ import annotations

import json
from pathlib import Path

import click

from spalf.cli.options import directory, existing_file
from spalf.config import load_sweep, parse_sweep
from spalf.config.sweep import SweepConfig
from spalf.errors import UserError


@click.command(
    "paper",
    epilog="Example: spalf paper --sweep config/config.yaml --manuscript paper/manuscript.typ "
    "--out results/paper",
)
@click.option("--sweep", "sweep_file", type=existing_file, help="YAML file of the sweep.")
@click.option("--settings", help="The same as one JSON object instead of a file.")
@click.option("--results", type=directory, default="results", help="Directory of the results.")
@click.option("--manuscript", type=existing_file, required=True, help="Typst source.")
@click.option("--partial", is_flag=True, help="Build from what is there; mark what is missing.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
def paper(
    sweep_file: Path | None,
    settings: str | None,
    results: Path,
    manuscript: Path,
    partial: bool,
    out: Path,
) -> None:
    """Write numbers, tables, figures and the PDF of a manuscript from a sweep's results."""
    from spalf.report.paper import build_paper

    build_paper(_sweep(sweep_file, settings), results, manuscript, out, partial=partial)


def _sweep(file: Path | None, settings: str | None) -> SweepConfig:
    if (file is None) == (settings is None):
        raise UserError("--sweep", None, "give either --sweep FILE or --settings JSON")
    if file is not None:
        return load_sweep(file)
    try:
        given = json.loads(settings or "")
    except ValueError as error:
        raise UserError("--settings", (settings or "")[:80], f"is not JSON: {error}") from None
    return parse_sweep(given, "--settings")
