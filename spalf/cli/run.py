"""``spalf-train`` and ``spalf-eval``: the whole pipeline for one run, without Snakemake."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spalf.cli.errors import run_cli
from spalf.cli.options import existing_file, read_config, reliability, skipping
from spalf.config import RunConfig
from spalf.errors import UserError

if TYPE_CHECKING:
    from spalf.steps.context import StepContext

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _start(
    config_file: Path, device: str | None, debug: bool, **policy: Any
) -> tuple[RunConfig, StepContext]:
    config = read_config(config_file, None, "{}", device)
    from spalf.cli.runtime import configure_logging, set_up

    configure_logging(debug)
    return config, set_up(config.runtime, config.seed, **policy)


@click.command(
    context_settings=_HELP, epilog="Example: spalf-train config/experiments/demo-2l.yaml"
)
@click.argument("config_file", type=existing_file)
@click.option("--device", help="auto, cpu, cuda or cuda:N; overrides runtime.device.")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@reliability
@skipping
def train_command(config_file: Path, **options: Any) -> None:
    """Calibrate, initialise, train both phases and evaluate, into the run's output_dir.

    Finished steps are not repeated; an interrupted one continues from its checkpoint.
    """
    config, context = _start(config_file, **options)
    from spalf.steps.pipeline import train_run

    click.echo(f"evaluation: {train_run(config, context)}")


@click.command(context_settings=_HELP, epilog="Example: spalf-eval config/experiments/demo-2l.yaml")
@click.argument("config_file", type=existing_file)
@click.option("--device", help="auto, cpu, cuda or cuda:N; overrides runtime.device.")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@reliability
def evaluate_command(config_file: Path, **options: Any) -> None:
    """Evaluate the SAE in the run's `checkpoint` directory on held-out tokens."""
    config, context = _start(config_file, **options)
    if config.checkpoint is None:
        remedy = "is missing; add the directory of a phase1 or phase2 step"
        raise UserError(f"{config_file}: checkpoint", None, remedy)
    from spalf.steps.pipeline import evaluate_run

    click.echo(f"evaluation: {evaluate_run(config, Path(config.checkpoint), context)}")


def train(**_: Any) -> None:
    """Entry point of ``spalf-train``."""
    run_cli(train_command)


def evaluate(**_: Any) -> None:
    """Entry point of ``spalf-eval``."""
    run_cli(evaluate_command)
