"""Options that several commands share, and how they become a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from spalf.config import RunConfig, RuntimeConfig, SweepConfig, load_sweep, parse, parse_sweep
from spalf.config.io import read_mapping
from spalf.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])

EACH_CELLS_OWN = {"L0_target": 1.0}
"""Required fields that the cells of a pack bring along."""

UNUSED_BY_CALIBRATION = {"F": 2**20, "L0_target": 1.0}
"""Required fields that calibration does not read; one calibration serves every cell."""

directory = click.Path(file_okay=False, path_type=Path)
existing_file = click.Path(dir_okay=False, path_type=Path)


def configuration(command: Command) -> Command:
    """``--config FILE`` or ``--settings JSON``, ``--runtime JSON``, ``--device``, ``--debug``."""
    options = [
        click.option("--config", "config_file", type=existing_file, help="YAML file of one run."),
        click.option("--settings", help="The same as one JSON object instead of a file."),
    ]
    command = execution(command)
    for option in reversed(options):
        command = option(command)
    return reliability(command)


def execution(command: Command) -> Command:
    """``--runtime JSON``, ``--device``, ``--debug``."""
    options = [
        click.option("--runtime", default="{}", help="JSON overriding the runtime section."),
        click.option("--device", help="auto, cpu, cuda or cuda:N; overrides runtime.device."),
        click.option("--debug", is_flag=True, help="Show tracebacks and debug messages."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def reliability(command: Command) -> Command:
    """``--if-locked`` and ``--if-foreign``: what to do about other processes and other runs."""
    locked = click.option(
        "--if-locked",
        type=click.Choice(["exit", "wait"]),
        default="exit",
        help="Where another process works on the same output: exit (status 75) or wait for it.",
    )
    foreign = click.option(
        "--if-foreign",
        type=click.Choice(["refuse", "restart"]),
        default="refuse",
        help="Checkpoints of other settings: refuse them, or set them aside and start anew.",
    )
    return locked(foreign(command))


def skipping(command: Command) -> Command:
    """``--skip-nonfinite N``, for the steps that train."""
    option = click.option(
        "--skip-nonfinite",
        type=click.IntRange(min=0),
        default=0,
        help="Go past up to N batches whose loss or gradient is not finite; they are recorded.",
    )
    return option(command)


def finished_only(command: Command) -> Command:
    """``--finished-only``, for the steps that a pack may have done already."""
    option = click.option(
        "--finished-only",
        is_flag=True,
        help="Take the result of a pack; fail where there is none, instead of training.",
    )
    return option(command)


def context_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of ``options`` what `StepContext` wants to know."""
    names = ("if_locked", "if_foreign", "skip_nonfinite", "finished_only")
    return {name: options.pop(name) for name in names if name in options}


def sweep(command: Command) -> Command:
    """``--sweep FILE`` or ``--settings JSON``, and ``--results``: cells of a sweep and their place.

    However many there are, the command line stays short.
    """
    options = [
        click.option("--sweep", "sweep_file", type=existing_file, help="YAML file of the sweep."),
        click.option("--settings", help="The same as one JSON object instead of a file."),
        click.option("--results", type=directory, default="results", help="Directory of results."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_sweep(sweep_file: Path | None, settings: str | None) -> SweepConfig:
    """The sweep from the options of `sweep`.

    Raises:
        UserError: neither or both sources were given, or the content is invalid.
    """
    if (sweep_file is None) == (settings is None):
        raise UserError("--sweep", None, "give either --sweep FILE or --settings JSON")
    if sweep_file is not None:
        return load_sweep(sweep_file)
    return parse_sweep(json_object("--settings", settings or ""), "--settings")


def read_config(
    config_file: Path | None,
    settings: str | None,
    runtime: str,
    device: str | None,
    defaults: dict[str, Any] | None = None,
) -> RunConfig:
    """The run's configuration from the options of `configuration`.

    Raises:
        UserError: neither or both sources were given, or the content is invalid.
    """
    if (config_file is None) == (settings is None):
        raise UserError("--config", None, "give either --config FILE or --settings JSON")
    if config_file is not None:
        where, data = str(config_file), read_mapping(config_file)
    else:
        where, data = "--settings", json_object("--settings", settings or "")
    overrides = _runtime_overrides(runtime, device)
    runtime_section = data.get("runtime") or {}
    if overrides and isinstance(runtime_section, dict):
        data = {**data, "runtime": {**runtime_section, **overrides}}
    return parse(RunConfig, {**(defaults or {}), **data}, where)


def read_runtime(runtime: str, device: str | None) -> RuntimeConfig:
    """The runtime section from the options of `execution`, for a step without a configuration.

    Raises:
        UserError: the content is invalid.
    """
    return parse(RuntimeConfig, _runtime_overrides(runtime, device), "--runtime")


def _runtime_overrides(runtime: str, device: str | None) -> dict[str, Any]:
    return json_object("--runtime", runtime) | ({"device": device} if device else {})


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option holds.

    Raises:
        UserError: it is something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(option, text[:80], f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(option, text[:80], "must be a JSON object")
    return value
