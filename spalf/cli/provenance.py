"""``spalf provenance``, and what lets a command record how it was called."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from spalf.cli.options import existing_file, json_object
from spalf.cli.revision import commit
from spalf.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])

_CALL = "spalf.cli.provenance.call"
_OPTION = "--workflow"


class Recorded(click.Command):
    """A command that remembers the arguments it was given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual; keep what was given."""
        ctx.meta[_CALL] = list(args)
        return super().parse_args(ctx, args)


def from_workflow(command: Command) -> Command:
    """``--workflow JSON``: what a workflow that calls the command says of itself."""
    said = "Rule, configuration files and settings of the workflow that calls this, as JSON."
    return click.option(_OPTION, default="{}", help=said)(command)


def record(workflow: str, folder: Path, outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Write down, beside the outputs of the running `Recorded` command, how they were made."""
    from spalf.report.provenance import Origin, write_record

    context = click.get_current_context()
    name = str(context.info_name)
    call = shlex.join(["spalf", name, *_without_option(context.meta.get(_CALL, []))])
    origin = Origin(name, call, commit(), json_object(_OPTION, workflow))
    write_record(origin, folder, outputs, inputs)


def _without_option(arguments: Iterable[str]) -> Iterator[str]:
    given = iter(arguments)
    for argument in given:
        if argument == _OPTION:
            next(given, None)
        elif not argument.startswith(f"{_OPTION}="):
            yield argument


@click.command("provenance", epilog="Example: spalf provenance results/figures/pareto.pdf")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for other programs.")
@click.argument("file", type=existing_file)
def provenance(file: Path, as_json: bool) -> None:
    """Say where a result came from: inputs, configuration, commit, versions, command.

    FILE is a table, figure, number or manuscript of a sweep, an evaluation, or a file of a step.
    """
    found = describe_provenance(file)
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else _text(found))


def describe_provenance(file: Path) -> dict[str, Any]:
    """Everything that is recorded of a file and, one after the other, of what it was made from.

    Raises:
        UserError: nothing is recorded of it.
    """
    from spalf.report.provenance import provenance_of, state_of_input

    found = provenance_of(file)
    if found.state == "no record" or (found.state == "missing" and found.inputs is None):
        remedy = {
            "missing": "no such file, and no record of it",
            "no record": "nothing is recorded of it; make it again with this version",
        }[found.state]
        raise UserError("FILE", str(file), remedy)
    inputs, queue = [], [(file, found)]
    seen = {file.as_posix()}
    while queue:
        of, known = queue.pop(0)
        for name, digest in (known.inputs or {}).items():
            if name in seen or known.command == "":
                continue
            seen.add(name)
            path = Path(name)
            deeper = provenance_of(path)
            queue.append((path, deeper))
            entry = {"path": name, "state": state_of_input(path, digest), "of": of.as_posix()}
            inputs.append(entry | {"commit": deeper.commit, "command": deeper.command})
    return {
        "file": file.as_posix(),
        "state": found.state,
        "command": found.command,
        "again": found.again,
        "configfiles": list(found.configfiles),
        "settings": found.settings,
        "commit": found.commit,
        "versions": dict(found.versions or {}),
        "inputs": inputs,
        "digests": {} if found.command else dict(found.inputs or {}),
    }


def _text(found: dict[str, Any]) -> str:
    """As a few named lines and a list."""
    settings = found["settings"]
    shown = {
        "state": found["state"],
        "made by": found["command"],
        "again": found["again"],
        "config": ", ".join(found["configfiles"]),
        "settings": json.dumps(settings, ensure_ascii=False) if settings else "",
        "commit": found["commit"],
        "versions": ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
    }
    lines = [found["file"], *(f"  {name:<9} {text}" for name, text in shown.items() if text)]
    lines += [f"  {'input':<9} {name} {digest[:16]}" for name, digest in found["digests"].items()]
    before = found["file"]
    for entry in found["inputs"]:
        if entry["of"] != before:
            before = entry["of"]
            lines.append(before)
        commit = f"  commit {entry['commit']}" if entry["commit"] else ""
        lines.append(f"  {'input':<9} {entry['path']}  {entry['state']}{commit}")
    return "\n".join(lines)
