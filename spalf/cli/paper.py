"""``spalf paper``: a manuscript whose every number, table and figure comes from the results."""

from __future__ import annotations

from pathlib import Path

import click

from spalf.cli.options import directory, existing_file, read_sweep, sweep


@click.command(
    "paper",
    epilog="Example: spalf paper --sweep config/config.yaml --manuscript paper/manuscript.typ "
    "--out results/paper",
)
@sweep
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

    build_paper(read_sweep(sweep_file, settings), results, manuscript, out, partial=partial)
