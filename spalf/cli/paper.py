"""``spalf paper``: a manuscript whose every number, table and figure comes from the results."""

from __future__ import annotations

from pathlib import Path

import click

from spalf.cli.options import directory, existing_file, json_object, read_sweep, sweep
from spalf.cli.provenance import Recorded, from_workflow, record


@click.command(
    "paper",
    cls=Recorded,
    epilog="Example: spalf paper --sweep config/config.yaml --manuscript paper/manuscript.typ "
    "--out results/paper",
)
@sweep
@click.option("--manuscript", type=existing_file, required=True, help="Typst source.")
@click.option("--partial", is_flag=True, help="Build from what is there; mark what is missing.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
@from_workflow
def paper(
    sweep_file: Path | None,
    settings: str | None,
    results: Path,
    manuscript: Path,
    partial: bool,
    out: Path,
    workflow: str,
) -> None:
    """Write numbers, tables, figures and the PDF of a manuscript from a sweep's results."""
    from spalf.report.paper import build_paper

    files = json_object("--workflow", workflow).get("configfiles") or [sweep_file or ""]
    made = build_paper(
        read_sweep(sweep_file, settings),
        results,
        manuscript,
        out,
        partial=partial,
        config=" ".join(map(str, files)),
    )
    sources = [sweep_file] if sweep_file else []
    record(workflow, out, made.outputs, [*made.inputs, *sources])
