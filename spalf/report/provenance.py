"""Where a result came from: a record beside it, written by the command that made it.

``<folder>/provenance/<command>.json`` says of every file that one command wrote into a folder: its
digest, the files it was made from and theirs, the command, the configuration, the commit and the
versions. Nothing in it depends on when it was written.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spalf.errors import UserError
from spalf.report.files import replacing

FOLDER = "provenance"
PACKAGES = ("spalf", "numpy", "pandas", "matplotlib", "typst", "snakemake")
"""Versions that a table or a figure may depend on."""


@dataclass(frozen=True)
class Origin:
    """How a command was called.

    Attributes:
        name: of the command, such as ``figures``.
        command: the whole of it.
        commit: revision of the code, or an empty string.
        workflow: what a workflow said of itself: ``configfiles``, ``overrides`` and ``settings``
            of the sweep; empty where the command was called by hand.
    """

    name: str
    command: str
    commit: str = ""
    workflow: Mapping[str, Any] | None = None


def write_record(
    origin: Origin, folder: Path, outputs: Iterable[Path], inputs: Iterable[Path]
) -> Path:
    """Record that ``outputs``, in ``folder``, were made from ``inputs``.

    Args:
        origin: how.
        folder: where the outputs lie, some of them perhaps deeper.
        outputs: files that were made.
        inputs: files that were read; named as they are given, so relative to where the command
            was called.

    Returns:
        The path of the record.
    """
    record = {
        "command": origin.command,
        "commit": origin.commit,
        "workflow": dict(origin.workflow or {}),
        "versions": versions(),
        "inputs": {path.as_posix(): digest(path) for path in sorted(set(inputs))},
        "outputs": {
            path.relative_to(folder).as_posix(): digest(path) for path in sorted(set(outputs))
        },
    }
    path = folder / FOLDER / f"{origin.name}.json"
    text = json.dumps(record, indent=1, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    return path


def versions() -> dict[str, str]:
    """Of the interpreter and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(str(path), None, f"cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Provenance:
    """What is known of a file.

    Attributes:
        path: the file.
        state: ``as made``, ``changed since it was made``, ``missing`` or ``no record``.
        command: that made it; empty where that is not recorded.
        again: the command that makes it again.
        configfiles: of the sweep, where a workflow made it.
        settings: of the sweep or of the run.
        commit: of the code that made it.
        versions: of interpreter and packages, and the device.
        inputs: files it was made from, and the digest each had.
    """

    path: Path
    state: str
    command: str = ""
    again: str = ""
    configfiles: Sequence[str] = ()
    settings: Mapping[str, Any] | None = None
    commit: str = ""
    versions: Mapping[str, str] | None = None
    inputs: Mapping[str, str] | None = None


def provenance_of(path: Path) -> Provenance:
    """What is recorded of a file, by the command that made it.

    Tables, figures and manuscripts have a record in a folder beside them; an ``evaluation.json``
    and a ``consistency.json`` say it themselves, and of a step's directory its ``metadata.json``
    does.
    """
    found = _recorded(path) or _of_report(path) or _of_checkpoint(path)
    if found is not None:
        return found
    return Provenance(path, "no record" if path.exists() else "missing")


def _recorded(path: Path) -> Provenance | None:
    for folder in path.parents:
        for file in sorted((folder / FOLDER).glob("*.json")):
            record = _read(file)
            name = path.relative_to(folder).as_posix()
            if name not in record.get("outputs", {}):
                continue
            workflow = record["workflow"]
            return Provenance(
                path=path,
                state=_state(path, record["outputs"][name]),
                command=record["command"],
                again=_again(path, workflow) if workflow else record["command"],
                configfiles=workflow.get("configfiles", ()),
                settings=workflow.get("settings"),
                commit=record["commit"],
                versions=record["versions"],
                inputs=record["inputs"],
            )
    return None


def _again(path: Path, workflow: Mapping[str, Any]) -> str:
    """The call of Snakemake that makes a file again, also where it sees no reason to."""
    words = ["snakemake"]
    if workflow.get("configfiles"):
        words += ["--configfile", *workflow["configfiles"]]
    if workflow.get("overrides"):
        words += ["--config", *workflow["overrides"]]
    return shlex.join([*words, "--force", "--", workflow.get("rule") or path.as_posix()])


def _workflow_around(path: Path) -> dict[str, Any]:
    """Configuration of the sweep that a step's output is part of, as its tables record it."""
    for folder in path.parents:
        found = _read(folder / "tables" / FOLDER / "aggregate.json").get("workflow") or {}
        if found:
            return {name: found.get(name) for name in ("configfiles", "overrides")}
    return {}


def _of_report(path: Path) -> Provenance | None:
    """Of a JSON report of one SAE or of several, which says what it was made from itself."""
    report = _read(path) if path.suffix == ".json" else {}
    environment = report.get("environment")
    if not isinstance(environment, dict):
        return None
    inputs = report.get("saes") or report.get("inputs") or {}
    return Provenance(
        path=path,
        state="as made" if path.exists() else "missing",
        again=_again(path, _workflow_around(path)),
        settings=report.get("settings"),
        commit=str(environment.get("commit") or ""),
        versions=_without_commit(environment),
        inputs=_flat(inputs),
    )


def _of_checkpoint(path: Path) -> Provenance | None:
    """Of a file that a step wrote, for which its ``metadata.json`` vouches."""
    for folder in path.parents[:2]:
        metadata = _read(folder / "metadata.json")
        name = path.relative_to(folder).as_posix()
        known = metadata.get("digests", {})
        environment = metadata.get("environment", {})
        if name in known or name == "metadata.json":
            return Provenance(
                path=path,
                state=_state(path, known[name]) if name in known else "as made",
                again=_again(path, _workflow_around(path)),
                settings=metadata.get("config"),
                commit=str(environment.get("commit") or ""),
                versions=_without_commit(environment),
                inputs=_flat(metadata.get("inputs", {})),
            )
    return None


def _without_commit(environment: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in environment.items() if name != "commit"}


def _flat(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Digests by name; those of one directory have its name before theirs."""
    found: dict[str, str] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": str(digest) for inner, digest in value.items()}
        else:
            found[name] = str(value)
    return found


def _state(path: Path, known: str) -> str:
    if not path.exists():
        return "missing"
    return "as made" if digest(path) == known else "changed since it was made"


def state_of_input(path: Path, known: str) -> str:
    """Whether an input is still what it was: ``unchanged``, ``changed since`` or ``missing``."""
    found = _state(path, known)
    return {"as made": "unchanged", "changed since it was made": "changed since"}.get(found, found)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
