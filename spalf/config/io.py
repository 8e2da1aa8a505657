"""Configuration files: YAML in, frozen types out, and one clear line when something is wrong."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from spalf.config.base import Frozen
from spalf.config.sweep import SweepConfig
from spalf.config.types import RunConfig
from spalf.errors import UserError

Model = TypeVar("Model", bound=Frozen)


def load_run(path: Path | str) -> RunConfig:
    """Read one SAE's configuration from YAML or JSON.

    Raises:
        UserError: the file cannot be read, or a field is unknown, missing or out of range.
    """
    return parse(RunConfig, read_mapping(path), str(path))


def load_sweep(path: Path | str) -> SweepConfig:
    """Read a sweep's configuration and validate every cell of its grid.

    Raises:
        UserError: as `load_run`; the key names the model where an override is at fault.
    """
    return parse_sweep(read_mapping(path), str(path))


def parse_sweep(data: Mapping[str, Any], where: str) -> SweepConfig:
    """`load_sweep` for a mapping already read, as Snakemake hands it over."""
    sweep = parse(SweepConfig, data, where)
    for cell in sweep.cells():
        try:
            sweep.run_config(cell)
        except ValidationError as error:
            # A model's own cells come before those of its variants, so these change what is wrong.
            entry = f"variants.{cell.variant}" if cell.variant else f"models.{cell.model}"
            raise _one_line(error, RunConfig, f"{where}: {entry}") from None
    return sweep


def parse(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """Validate ``data`` as ``model``; ``where`` (a file name) opens the error message.

    Raises:
        UserError: for the first fault found.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _one_line(error, model, where) from None


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The top-level mapping of a YAML (or JSON) file.

    Raises:
        UserError: unreadable, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("config", str(path), "no such file; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        remedy = f"not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise UserError("config", str(path), remedy) from None
    except OSError as error:
        raise UserError("config", str(path), f"cannot be read: {error.strerror}") from None
    try:
        data = _load(text)
    except _Duplicate as error:
        raise UserError("config", str(path), str(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise UserError("config", str(path), f"not valid YAML{line}: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date or a number that is none, a deep nest
        problem = str(error).split(";")[0]
        raise UserError("config", str(path), f"not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise UserError("config", str(path), f"is {kind}, not a mapping of `key: value` lines")
    return data


class _Duplicate(Exception):
    """A key that stands twice in one mapping; says which, and where."""


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, which would silently take the last of several equal keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            # `<<` brings defaults, which the mapping's own keys override.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, first = key.start_mark.line + 1, lines.get((key.tag, key.value))
            if first is not None:
                where = f"at line {line}" if line == first else f"at lines {first} and {line}"
                raise _Duplicate(f"key {key.value!r} is given twice, {where}; remove one")
            lines[key.tag, key.value] = line
        return node


def _load(text: str) -> Any:
    loader = _UniqueKeys(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def to_yaml(config: Frozen) -> str:
    """The configuration as YAML that `load_run` or `load_sweep` reads back to an equal value."""
    # Through JSON, because YAML has no tuples and the types must come back as written.
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _one_line(error: ValidationError, model: type[BaseModel], where: str) -> UserError:
    """The first fault of a validation error as ``key = value: remedy``."""
    # A misspelt key is also a missing one; the spelling is the better thing to speak of.
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    path = [part for part in fault["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in path)
    prefix = f"{where}: {key}" if key else where
    if fault["type"] == "extra_forbidden":
        return UserError(prefix, fault["input"], f"unknown key; {_suggest(model, path)}")
    if fault["type"] == "missing":
        return UserError(prefix, None, "is missing; add it")
    if fault["type"] == "value_error":
        # Where fields contradict each other, the message names them; the input is all of them.
        value = None if isinstance(fault["input"], Mapping) else fault["input"]
        return UserError(prefix, value, str(fault["ctx"]["error"]))
    return UserError(prefix, fault["input"], _explain(fault["msg"], fault["input"]))


def _explain(message: str, value: object) -> str:
    remedy = message[0].lower() + message[1:]
    close = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", message), n=1)
    if message.startswith("Input should be '") and close:
        return f"{remedy}; did you mean {close[0]!r}?"
    if isinstance(value, str) and "valid number" in message and _is_number(value):
        return f"{remedy}, but YAML reads this as text; write {yaml_number(float(value))}"
    return remedy


def yaml_number(value: float) -> str:
    """A number as YAML reads it back: 1.0e-05, where Python would write 1e-05."""
    return yaml.safe_dump(value).split("\n")[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _suggest(model: type[BaseModel], path: list[int | str]) -> str:
    """A "did you mean" for the last element of ``path``, among its siblings."""
    known = _fields_at(model, path[:-1])
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(sorted(known))}"


def _fields_at(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    current: Any = model
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        else:  # a dict of models: the key is free, the value type is the last argument
            current = getattr(current, "__args__", (None,))[-1]
        current = _strip(current)
    is_model = isinstance(current, type) and issubclass(current, BaseModel)
    return list(current.model_fields) if is_model else []


def _strip(annotation: Any) -> Any:
    """Unwrap ``Annotated`` and ``Optional`` down to the type a field holds."""
    if hasattr(annotation, "__metadata__"):
        return _strip(annotation.__origin__)
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    is_optional = type(None) in getattr(annotation, "__args__", ())
    return _strip(arguments[0]) if is_optional and len(arguments) == 1 else annotation
