"""Generated configurations: each is either taken as it is or refused in one line."""

from __future__ import annotations

import json
import math
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


RUN_PATHS = [*_fields(RunConfig), ("unknown",), ("method", "unknown"), ("LR",)]
SWEEP_PATHS = [
    *_fields(SweepConfig),
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


def _changes(paths: list[tuple[str, ...]]) -> st.SearchStrategy[list[tuple[Any, Any]]]:
    return st.lists(st.tuples(st.sampled_from(paths), VALUES), min_size=1, max_size=3)


def _refused_in_one_line(error: UserError, where: str) -> None:
    text = str(error)
    assert text.startswith(where)
    assert "\n" not in text and len(text) < 1000
    assert error.remedy


@QUIET
@given(_changes(RUN_PATHS))
def test_a_run_is_taken_or_refused_in_one_line(changes: list[tuple[Any, Any]]) -> None:
    data = SOUND
    for path, value in changes:
        data = _set(data, path, value)
    try:
        config = parse(RunConfig, data, "run.yaml")
    except UserError as error:
        _refused_in_one_line(error, "run.yaml")
        return
    assert describe(config)
    assert parse(RunConfig, yaml.safe_load(to_yaml(config)), "again") == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@QUIET
@given(_changes(SWEEP_PATHS))
def test_a_sweep_is_taken_or_refused_in_one_line(changes: list[tuple[Any, Any]]) -> None:
    data = SWEEP
    for path, value in changes:
        data = _set(data, path, value)
    try:
        sweep = parse_sweep(data, "sweep.yaml")
    except UserError as error:
        _refused_in_one_line(error, "sweep.yaml")
        return
    for cell in sweep.cells():
        directory = Path("results") / cell.model / f"L0_{cell.L0_target:g}" / f"seed_{cell.seed}"
        assert ".." not in directory.parts and len(directory.parts) == 4
        assert describe(sweep.run_config(cell))


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
