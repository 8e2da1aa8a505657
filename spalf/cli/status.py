"""``spalf status``: what became of the steps of a sweep."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    "status",
    epilog="Example: spalf status results",
    help="Say which steps of a sweep are not done.",
)
@click.argument("results", type=click.Path(path_type=Path, file_okay=False), default="results")
def status(results: Path) -> None:
    """Print counts by state, then job, node, reason and log of every step that is not done."""
    from spalf.report.status import describe_status

    click.echo(describe_status(results))
