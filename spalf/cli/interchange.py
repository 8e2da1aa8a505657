"""``spalf export`` and ``spalf import``: SAEs as other tools want them, and theirs."""

from __future__ import annotations

from pathlib import Path

import click

from spalf.cli.options import directory, existing_file

FORMATS = ("saelens", "dictionary_learning", "sparsify")


@click.command(
    "export",
    epilog="Example: spalf export --format saelens results/demo-2l/L0_16/seed_0/phase2 my-sae",
)
@click.option("--format", type=click.Choice(FORMATS), required=True, help="The tool to write for.")
@click.option("--k", type=int, help="Features per token; for sparsify, which has no thresholds.")
@click.option("--unit-norm", is_flag=True, help="Scale codes so that decoder rows have norm 1.")
@click.option("--card", is_flag=True, help="Add a model card (README.md) for the hub.")
@click.option(
    "--evaluation", type=existing_file, help="evaluation.json for the card; default: beside SAE."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.argument("sae", type=directory)
@click.argument("out", type=directory)
def export(
    sae: Path,
    out: Path,
    format: str,
    k: int | None,
    unit_norm: bool,
    card: bool,
    evaluation: Path | None,
    debug: bool,
) -> None:
    """Write a trained SAE in another tool's format, whitening folded in.

    SAE is an init, phase1 or phase2 directory, OUT the folder to make.
    """
    from spalf.interchange.export import export as run

    run(sae, out, format, k=k, unit_norm=unit_norm, card=card, evaluation=evaluation)


@click.command(
    "import",
    epilog="Example: spalf import their-sae results/demo-2l/imported/theirs",
)
@click.option(
    "--l0-target", type=float, help="Active features per token it was made for; if it does not say."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.argument("source", type=directory)
@click.argument("out", type=directory)
def import_(source: Path, out: Path, l0_target: float | None, debug: bool) -> None:
    """Take in an SAE made with SAELens, to be evaluated beside your own.

    SOURCE is a SAELens folder. In results/MODEL/imported/NAME the workflow finds it, evaluates it
    on the tokens of that model of the sweep, and adds it to the tables and the frontier.
    """
    from spalf.interchange.importing import import_sae

    import_sae(source, out, l0_target)
