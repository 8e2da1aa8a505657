"""``spalf status``: what became of the cells of a sweep."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    "status",
    epilog="Example: spalf status results --configfile config/config.yaml",
    help="Print the grid of a sweep: done, running, stopped.",
)
@click.option(
    "--configfile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration of the sweep; lists also its cells that were not started.",
)
@click.argument("results", type=click.Path(path_type=Path, file_okay=False), default="results")
def status(results: Path, configfile: Path | None) -> None:
    """Print the grid as a table, then job, node, reason and log of every step that stopped."""
    from spalf.config import load_sweep
    from spalf.report.grid import describe_status

    click.echo(describe_status(results, load_sweep(configfile) if configfile else None))
