"""The ``spalf`` command: one subcommand for each step of the workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spalf.cli.data import data
from spalf.cli.errors import run_cli
from spalf.cli.init_workflow import init_workflow
from spalf.cli.interchange import export, import_
from spalf.cli.listing import Listing
from spalf.cli.options import (
    EACH_CELLS_OWN,
    UNUSED_BY_CALIBRATION,
    configuration,
    context_options,
    directory,
    execution,
    existing_file,
    finished_only,
    read_config,
    read_runtime,
    read_sweep,
    skipping,
    sweep,
)
from spalf.cli.paper import paper
from spalf.cli.provenance import Recorded, from_workflow, provenance, record
from spalf.cli.status import status
from spalf.config import BASELINES, RunConfig, parse
from spalf.errors import UserError

EXAMPLES = {
    "calibrate": "spalf calibrate --config config/experiments/demo-2l.yaml --out run/calibration",
    "init": "spalf init --config run.yaml --calibration run/calibration --out run/init",
    "phase1": (
        "spalf phase1 --config run.yaml --calibration run/calibration --init run/init "
        "--out run/phase1"
    ),
    "phase2": (
        "spalf phase2 --config run.yaml --calibration run/calibration --phase1 run/phase1 "
        "--out run/phase2"
    ),
    "pack": (
        "spalf pack --config run.yaml --calibration run/calibration --cell 16 0 run/L0_16 "
        "--cell 32 0 run/L0_32 --out run/pack.json"
    ),
    "baseline": (
        "spalf baseline --config run.yaml --method batchtopk --calibration run/calibration "
        "--out run/batchtopk"
    ),
    "random": ("spalf random --config run.yaml --calibration run/calibration --out run/random"),
    "evaluate": (
        "spalf evaluate --config run.yaml --calibration run/calibration --phase1 run/phase1 "
        "--phase2 run/phase2 --out run/evaluation.json"
    ),
    "dashboard": (
        "spalf dashboard --config run.yaml --calibration run/calibration --phase1 run/phase1 "
        "--phase2 run/phase2 --evaluation run/evaluation.json --out run/dashboard.html"
    ),
    "aggregate": "spalf aggregate --sweep config/config.yaml --out results/tables",
    "consistency": "spalf consistency --out run/consistency.json seed_0/phase2 seed_1/phase2",
    "tables": "spalf tables --out results/tables results/tables/frontier.csv",
    "figures": (
        "spalf figures --sweep config/config.yaml --frontier results/tables/frontier.csv "
        "--out results/figures"
    ),
    "describe": "spalf describe config/experiments/demo-2l.yaml",
}


@click.group(
    cls=Listing,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="spalf")
def spalf() -> None:
    """Sparse autoencoders trained by constrained optimisation, step by step."""


def step(name: str, cls: type[click.Command] = click.Command) -> Any:
    """Register a command whose help ends with its example."""
    return spalf.command(name, cls=cls, epilog=f"Example: {EXAMPLES[name]}")


def _start(options: dict[str, Any], defaults: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Configuration and context of a step; the configuration is checked before torch loads."""
    debug, policy = options.pop("debug"), context_options(options)
    config = read_config(defaults=defaults, **options)
    from spalf.cli.runtime import configure_logging, set_up

    configure_logging(debug)
    return config, set_up(config.runtime, config.seed, **policy)


@step("calibrate")
@configuration
@click.option("--out", type=directory, required=True, help="Directory to write.")
def calibrate(out: Path, **options: Any) -> None:
    """Tokenise the dataset; estimate mean, covariance and whitener; pick the anchors."""
    config, context = _start(options, UNUSED_BY_CALIBRATION)
    from spalf.steps.calibrate import calibrate as run

    run(config, out, context)


@step("init")
@configuration
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
def init(calibration: Path, out: Path, **options: Any) -> None:
    """Build one SAE: anchors, matched-filter encoder, thresholds, scale."""
    config, context = _start(options)
    from spalf.steps.initialise import initialise_step

    initialise_step(config, calibration, out, context)


@step("phase1")
@configuration
@skipping
@finished_only
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--init", "initial", type=directory, required=True, help="Output of init.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
def phase1(calibration: Path, initial: Path, out: Path, **options: Any) -> None:
    """Train on activations until the constraints hold. Resumes where it was interrupted."""
    config, context = _start(options)
    from spalf.steps.train import phase1 as run

    run(config, calibration, initial, out, context)


@step("phase2")
@configuration
@skipping
@finished_only
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--phase1", "previous", type=directory, required=True, help="Output of phase1.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
def phase2(calibration: Path, previous: Path, out: Path, **options: Any) -> None:
    """Train end to end through the language model. Resumes where it was interrupted."""
    config, context = _start(options)
    from spalf.steps.train import phase2 as run

    run(config, calibration, previous, out, context)


@step("pack")
@configuration
@skipping
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option(
    "--cell",
    "cells",
    type=(float, int, directory),
    multiple=True,
    required=True,
    metavar="L0_TARGET SEED DIR",
    help="A cell; DIR holds its init and gets phase1 and phase2. Give as many as there are.",
)
@click.option("--out", type=existing_file, required=True, help="JSON file to write last.")
def pack(
    calibration: Path, cells: tuple[tuple[float, int, Path], ...], out: Path, **options: Any
) -> None:
    """Train several cells on one stream of activations, as phase1 and phase2 would one by one."""
    config, context = _start(options, EACH_CELLS_OWN)
    from spalf.steps.train import pack as run

    own = {place: _cell(config, target, seed) for target, seed, place in cells}
    run(own, calibration, out, context)


def _cell(config: RunConfig, l0_target: float, seed: int) -> RunConfig:
    own = {"L0_target": l0_target, "seed": seed}
    return parse(RunConfig, {**config.model_dump(mode="json"), **own}, "--cell")


@step("baseline")
@configuration
@click.option("--method", type=click.Choice(BASELINES), required=True, help="What is trained.")
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--rate-of", type=directory, help="Output of another seed, whose rate is taken.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
def baseline(
    method: str, calibration: Path, rate_of: Path | None, out: Path, **options: Any
) -> None:
    """Train a SAELens SAE on the activations of Phase 1, at the best of several learning rates."""
    config, context = _start(options)
    from spalf.steps.baseline import baseline as run

    run(config, method, calibration, out, context, rate_of)


@step("random")
@configuration
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--out", type=directory, required=True, help="Directory to write.")
def random(calibration: Path, out: Path, **options: Any) -> None:
    """Make an untrained SAE with random directions, which every trained one has to beat."""
    config, context = _start(options)
    from spalf.steps.sanity import random_step

    random_step(config, calibration, out, context)


@step("evaluate")
@configuration
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--phase1", "first", type=directory, help="Output of phase1.")
@click.option("--phase2", "second", type=directory, help="Output of phase2.")
@click.option("--sae", type=directory, help="Instead: output of baseline, or a SAELens folder.")
@click.option("--model", help="Short name of the model in tables; default: model_name.")
@click.option("--variant", default="", help="Name of the variant in tables; default: none.")
@click.option("--out", type=existing_file, required=True, help="JSON file to write.")
def evaluate(
    calibration: Path,
    first: Path | None,
    second: Path | None,
    sae: Path | None,
    model: str | None,
    variant: str,
    out: Path,
    **options: Any,
) -> None:
    """Measure both phases' SAEs, or one of SAELens, on held-out tokens."""
    if first and second and not sae:
        phases = {"phase1": first, "phase2": second}
    elif sae and not first and not second:
        phases = {"sae": sae}
    else:
        raise UserError("--sae", None, "give either --phase1 and --phase2, or --sae")
    config, context = _start(options)
    from spalf.steps.evaluate import evaluate as run

    run(config, calibration, phases, out, context, model, variant)


@step("dashboard")
@configuration
@click.option("--calibration", type=directory, required=True, help="Output of calibrate.")
@click.option("--phase1", "first", type=directory, help="Output of phase1.")
@click.option("--phase2", "second", type=directory, help="Output of phase2; without it, phase1's.")
@click.option("--sae", type=directory, help="Instead: output of baseline, or a SAELens folder.")
@click.option("--evaluation", type=existing_file, help="evaluation.json, for the key figures.")
@click.option("--frontier", type=existing_file, help="frontier.csv, for the SAEs beside it.")
@click.option("--model", help="Short name of the model in tables; default: model_name.")
@click.option("--variant", default="", help="Name of the variant in tables; default: none.")
@click.option("--out", type=existing_file, required=True, help="HTML file to write.")
def dashboard(
    calibration: Path,
    first: Path | None,
    second: Path | None,
    sae: Path | None,
    model: str | None,
    variant: str,
    out: Path,
    evaluation: Path | None,
    frontier: Path | None,
    **options: Any,
) -> None:
    """Write one self-contained page to look at an SAE's features."""
    if sae and not first and not second:
        phases = {"sae": sae}
    elif first and not sae:
        phases = {"phase1": first} | ({"phase2": second} if second else {})
    else:
        raise UserError(
            "--sae", None, "give either --phase1, and --phase2 if there is one, or --sae"
        )
    config, context = _start(options)
    from spalf.steps.dashboard import dashboard as run

    run(
        config,
        calibration,
        phases,
        out,
        context,
        evaluation=evaluation,
        frontier=frontier,
        model_label=model,
        variant=variant,
    )


@step("consistency")
@execution
@click.option("--out", type=existing_file, required=True, help="JSON file to write.")
@click.argument("saes", nargs=-1, required=True, type=directory)
def consistency(
    out: Path, saes: tuple[Path, ...], runtime: str, device: str | None, debug: bool
) -> None:
    """Compare the dictionaries of SAEs that differ only in their seed (PW-MCC)."""
    chosen = read_runtime(runtime, device)
    from spalf.cli.runtime import configure_logging, set_up

    configure_logging(debug)
    from spalf.steps.consistency import consistency as run

    run(saes, out, set_up(chosen, seed=0))


@step("aggregate", Recorded)
@sweep
@click.option("--out", type=directory, required=True, help="Directory of the tables.")
@from_workflow
@click.argument("evaluations", nargs=-1, type=existing_file)
def aggregate(
    out: Path, evaluations: tuple[Path, ...], results: Path, workflow: str, **given: Any
) -> None:
    """Collect a sweep's evaluation.json files, or those named, into frontier.csv and phases.csv."""
    from spalf.report.aggregate import aggregate as run
    from spalf.report.places import evaluations_of

    found = evaluations or evaluations_of(read_sweep(**given), results)
    record(workflow, out, run(found, out), found)


@step("tables", Recorded)
@click.option("--out", type=directory, required=True, help="Directory of the tables.")
@from_workflow
@click.argument("tables", nargs=-1, required=True, type=existing_file)
def tables(out: Path, tables: tuple[Path, ...], workflow: str) -> None:
    """Write each CSV as Markdown, LaTeX and HTML."""
    from spalf.report.tables import write_tables

    record(workflow, out, write_tables(tables, out), tables)


@step("figures", Recorded)
@sweep
@click.option("--out", type=directory, required=True, help="Directory of the figures.")
@from_workflow
@click.option("--frontier", type=existing_file, required=True, help="frontier.csv")
def figures(out: Path, frontier: Path, results: Path, workflow: str, **given: Any) -> None:
    """Draw the frontier and, of a sweep, the course of training of each model's cells."""
    from spalf.report.figures import control_figure, pareto_figures
    from spalf.report.places import metrics_of

    by_model = metrics_of(read_sweep(**given), results) if any(given.values()) else {}
    drawn = pareto_figures(frontier, out)
    for model, metrics in by_model.items():
        drawn += control_figure(model, metrics, out)
    read = [frontier, *(path for metrics in by_model.values() for path in metrics)]
    record(workflow, out, drawn, read)


@step("describe")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--cell", help="Cell of a sweep, as MODEL/L0_<target>/seed_<seed>.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def describe(source: Path, cell: str | None, debug: bool) -> None:
    """List every derived parameter with its formula, value and source.

    SOURCE is the YAML file of a run or a sweep, or the directory of an init, phase1 or phase2
    step, where the values that come from data are known.
    """
    from spalf.cli.describe import description

    click.echo(description(source, cell))


spalf.add_command(data)
spalf.add_command(export)
spalf.add_command(import_)
spalf.add_command(init_workflow)
spalf.add_command(paper)
spalf.add_command(provenance)
spalf.add_command(status)


def main() -> None:
    """Entry point of ``spalf``."""
    run_cli(spalf)
