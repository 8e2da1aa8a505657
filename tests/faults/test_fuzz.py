"""Generated configurations: each is either taken as it is or refused in one line."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from spalf.config import RunConfig, SweepConfig, describe, parse, parse_sweep, to_yaml
from spalf.config.io import read_mapping
from spalf.errors import UserError
from tests.faults.harness import run

QUIET = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

SOUND: dict[str, Any] = {
    "model_name": "spalf/demo-2l",
    "hook_point": "blocks.1.hook_resid_post",
    "dataset": "python-stdlib",
    "F": 128,
    "L0_target": 8,
    "total_tokens": 65_536,
    "batch_size": 512,
    "seq_len": 64,
}
SWEEP: dict[str, Any] = {
    "models": {"tiny": {"model_name": "spalf/demo-2l", "hook_point": "blocks.0.hook_resid_post"}},
    "dataset": "python-stdlib",
    "grid": {"L0_target": [4, 8], "seed": [0]},
    "train": {"F": 256, "total_tokens": 65_536, "batch_size": 512, "seq_len": 64},
}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(),
    st.sampled_from([0, 1, -1, 2, 64, 512, 1e-4, 0.5, math.inf, math.nan, "3e-4", "auto", "", " "]),
    st.text(max_size=20),
    st.binary(max_size=8),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def _fields(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field of a configuration type, nested ones included."""
    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        found.append((*prefix, name))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _fields(field.annotation, (*prefix, name))
    return found


def _plausible(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of the kind, and mostly of the range, that a field's JSON schema asks for."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return st.one_of([_plausible(kind, root) for kind in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "items" in schema:
        return st.lists(_plausible(schema["items"], root), max_size=4)
    low = schema.get("minimum", schema.get("exclusiveMinimum", -4))
    high = min(schema.get("maximum", schema.get("exclusiveMaximum", 4096)), 2**16)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "integer": st.integers(math.floor(low), math.ceil(high)),
        "number": st.floats(low, high) | st.sampled_from([low, high, 0.5, 1]),
        "boolean": st.booleans(),
        "null": st.none(),
        "string": st.sampled_from(["auto", "cpu", "cuda:1", "a/b", "python-stdlib", "../x", ""]),
    }
    return kinds.get(schema.get("type", ""), VALUES)


Place = tuple[str, ...]
"""A field, by the names that lead to it."""


def _with_schema(model: type[BaseModel]) -> list[tuple[Place, st.SearchStrategy[Any]]]:
    """Every field of a configuration type, with values that its schema allows or nearly allows."""
    root = model.model_json_schema()
    found = []
    for path in _fields(model):
        schema = root
        for name in path:
            schema = (
                root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            )
            schema = schema["properties"][name]
        found.append((path, _plausible(schema, root)))
    return found


ODD_RUN_PATHS = [("unknown",), ("method", "unknown"), ("LR",)]
ODD_SWEEP_PATHS = [
    ("models", "tiny", "train"),
    ("models", "tiny", "train", "F"),
    ("models", "tiny", "evaluate", "tokens"),
    ("models", "tiny", "dataset"),
    ("models", "tiny", "model_name"),
    ("models", "../up"),
]


def _set(data: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**data, head: value}
    inner = data.get(head)
    return {**data, head: _set(inner if isinstance(inner, dict) else {}, tuple(rest), value)}


Changes = list[tuple[Place, Any]]


def _changes(model: type[BaseModel], odd: list[Place]) -> st.SearchStrategy[Changes]:
    """One to three fields with other values, of which about half are of the right kind."""
    known = _with_schema(model)
    paths = [path for path, _ in known] + odd
    plausible = st.sampled_from(known).flatmap(lambda pair: st.tuples(st.just(pair[0]), pair[1]))
    change = plausible | plausible | st.tuples(st.sampled_from(paths), VALUES)
    return st.lists(change, min_size=1, max_size=3)


RUN_CHANGES = _changes(RunConfig, ODD_RUN_PATHS)
SWEEP_CHANGES = _changes(SweepConfig, ODD_SWEEP_PATHS)


def _changed(data: dict[str, Any], changes: Changes) -> dict[str, Any]:
    for path, value in changes:
        data = _set(data, path, value)
    return data


def _refused_in_one_line(error: UserError, where: str) -> None:
    text = str(error)
    assert text.startswith(where)
    assert "\n" not in text and len(text) < 1000
    assert error.remedy


def test_a_run_is_taken_or_refused_in_one_line() -> None:
    seen: Counter[str] = Counter()

    @QUIET
    @given(RUN_CHANGES)
    def check(changes: Changes) -> None:
        seen["tried"] += 1
        try:
            config = parse(RunConfig, _changed(SOUND, changes), "run.yaml")
        except UserError as error:
            _refused_in_one_line(error, "run.yaml")
            return
        seen["taken"] += 1
        assert describe(config)
        assert parse(RunConfig, yaml.safe_load(to_yaml(config)), "again") == config
        assert RunConfig.model_validate_json(config.model_dump_json()) == config

    check()
    assert seen["tried"] >= 1000 and 200 <= seen["taken"] <= 800, seen


def test_a_sweep_is_taken_or_refused_in_one_line() -> None:
    seen: Counter[str] = Counter()

    @QUIET
    @given(SWEEP_CHANGES)
    def check(changes: Changes) -> None:
        seen["tried"] += 1
        try:
            sweep = parse_sweep(_changed(SWEEP, changes), "sweep.yaml")
        except UserError as error:
            _refused_in_one_line(error, "sweep.yaml")
            return
        seen["taken"] += 1
        places = [Path(cell.place) for cell in sweep.cells()]
        assert len(set(places)) == len(places)
        assert not any(".." in place.parts or place.is_absolute() for place in places)
        assert all(describe(sweep.run_config(cell)) for cell in sweep.cells())

    check()
    assert seen["tried"] >= 1000 and 100 <= seen["taken"] <= 800, seen


@settings(QUIET, max_examples=150)
@given(RUN_CHANGES)
def test_the_command_refuses_it_with_status_2_and_writes_nothing(
    place: Path, changes: Changes
) -> None:
    data = {**_changed(SOUND, changes), "output_dir": str(place / "run")}
    text = yaml.safe_dump(data, allow_unicode=True)
    try:
        parse(RunConfig, yaml.safe_load(text), "run.yaml")
    except UserError:
        (place / "run.yaml").write_text(text, encoding="utf-8")
        outcome = run(["spalf-train", str(place / "run.yaml")], place.with_name("errors"))
        assert outcome.status == 2, outcome.errors
        assert len(outcome.lines) == 1 and outcome.errors.startswith("spalf: ")
        assert [path.name for path in place.iterdir()] == ["run.yaml"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("command") / "place"
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


@QUIET
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(alphabet="{}[]:,-&*!#|>'\"%@` \n\tab1.e", max_size=40).map(str.encode),
        VALUES.map(lambda value: json.dumps(value, default=str).encode()),
    )
)
def test_any_bytes_are_read_or_refused_in_one_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        data = read_mapping(file)
        parse(RunConfig, data, str(file))
    except UserError as error:
        assert "\n" not in str(error)
        assert str(file) in str(error)
