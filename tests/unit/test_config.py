"""Configuration: what it accepts, what it says about what it does not, and what follows from it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from spalf.config import (
    RunConfig,
    Schedule,
    StructuralConstants,
    SweepConfig,
    describe,
    load_run,
    load_sweep,
    parse,
    parse_sweep,
    schedule,
    to_yaml,
)
from spalf.config.io import read_mapping, yaml_number
from spalf.errors import UserError

RUN: dict[str, Any] = {
    "model_name": "spalf/demo-2l",
    "hook_point": "blocks.1.hook_resid_post",
    "dataset": "python-stdlib",
    "F": 1024,
    "L0_target": 16,
    "total_tokens": 1_000_000,
    "batch_size": 1024,
    "seq_len": 128,
}
SWEEP: dict[str, Any] = {
    "models": {"demo": {"model_name": "m", "hook_point": "h"}},
    "dataset": {"path": "python-stdlib"},
    "grid": {"L0_target": [8, 16], "seed": [0, 1]},
    "train": {"F": 1024, "total_tokens": 1_000_000},
}


def changed(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``base`` with the dotted ``path`` set."""
    head, _, rest = path.partition(".")
    inner = base.get(head) or {}
    inner = {"path": inner} if isinstance(inner, str) else inner  # a dataset's short form
    new = changed(inner, rest, value) if rest else value
    return {**base, head: new}


def refused(base: dict[str, Any], path: str, value: Any) -> UserError:
    data = changed(base, path, value)
    with pytest.raises(UserError) as raised:
        parse_sweep(data, "file.yaml") if base is SWEEP else parse(RunConfig, data, "file.yaml")
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("file.yaml: ")
    return raised.value


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("L0_tarqet", "L0_target"),
        ("evaluate.token", "tokens"),
        ("method.surogate", "surrogate"),
        ("constants.kapa", "kappa"),
        ("runtime.devise", "device"),
        ("dataset.txt_field", "text_field"),
    ],
)
def test_unknown_key_of_a_run_suggests_a_sibling(path: str, meant: str) -> None:
    error = refused(RUN, path, 1)
    assert error.key == f"file.yaml: {path}"
    assert f"unknown key; did you mean '{meant}'?" in str(error)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("trian", "train"),
        ("train.total_token", "total_tokens"),
        ("grid.seeds", "seed"),
        ("models.demo.hook_pont", "hook_point"),
        ("models.demo.train.batchsize", "batch_size"),
        ("models.demo.evaluate.sweep_token", "sweep_tokens"),
        ("models.demo.dataset.spilt", "split"),
        ("dataset.txt_field", "text_field"),
        ("method.surogate", "surrogate"),
        ("evaluate.absorbtion", "absorption"),
        ("runtime.thread", "threads"),
    ],
)
def test_unknown_key_of_a_sweep_suggests_a_sibling(path: str, meant: str) -> None:
    base = SWEEP
    if path == "models.demo.dataset.spilt":
        data = changed(SWEEP, "models.demo.dataset", {"path": "p", "spilt": "x"})
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            parse_sweep(data, "file.yaml")
        return
    error = refused(base, path, 1)
    assert path.split(".")[-1] in error.key
    assert f"did you mean '{meant}'?" in str(error)


def test_unknown_key_like_no_other_lists_what_there_is() -> None:
    error = refused(RUN, "evaluate.zzz", 1)
    assert "known keys are absorption, probing, sweep_factors, sweep_tokens, tokens" in str(error)


def test_two_faults_are_reported_one_at_a_time() -> None:
    with pytest.raises(UserError) as raised:
        parse(RunConfig, {**RUN, "F": "x", "lr": "y"}, "file.yaml")
    assert str(raised.value).count("file.yaml") == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("F", 1024.0),
        ("F", "1024"),
        ("F", True),
        ("F", 0),
        ("F", -1),
        ("lr", True),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("R2_target", 1.0),
        ("R2_target", 0),
        ("L0_target", 0),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", 2**32),
        ("lr", 3.0),
        ("seq_len", 1),
        ("model_name", "a\nb"),
        ("evaluate.sweep_factors", [1.0, 0.0]),
        ("evaluate.sweep_factors", ["1"]),
        ("dtype", "float64"),
        ("backend", "jax"),
        ("model_name", ""),
        ("model_name", 3),
        ("dataset.path", ""),
        ("dataset", 3),
        ("trust_remote_code", "yes"),
        ("runtime.device", "gpu"),
        ("runtime.device", "cuda:x"),
        ("runtime.threads", 0),
        ("runtime.checkpoint_every_minutes", 0),
        ("method.phase2_fraction", 1.0),
        ("method.v_cap", 0),
        ("method.capu", 1),
        ("method.controller", "pid"),
        ("evaluate.tokens", 1.5),
        ("evaluate.sweep_factors", 1.0),
        ("constants.kappa", 0.5),
        ("constants.delta_cov", 0),
    ],
)
def test_wrong_types_and_ranges_are_refused_and_named(path: str, value: Any) -> None:
    assert re.sub(r"\.\d+$", "", refused(RUN, path, value).key) == f"file.yaml: {path}"


@pytest.mark.parametrize("text", ["3e-4", "1e-5", "2E-3", "1e-1"])
def test_a_number_that_yaml_reads_as_text_comes_with_one_that_it_does_not(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN) + f"lr: {text}\n")
    assert yaml.safe_load(path.read_text())["lr"] == text, "YAML 1.1 wants a dot"
    with pytest.raises(UserError, match=r"lr = '.*': .*YAML reads this as text; write ") as raised:
        load_run(path)
    written = re.search(r"write (\S+)$", str(raised.value))
    assert written is not None
    path.write_text(yaml.safe_dump(RUN) + f"lr: {written[1]}\n")
    assert load_run(path).lr == float(text)


def test_numbers_are_spelt_as_yaml_reads_them() -> None:
    for value in (3e-4, 1e-5, 1e22, 0.1, 2.0):
        assert yaml.safe_load(yaml_number(value)) == value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"L0_target": 1024}, r"L0_target = 1024 must be below F = 1024"),
        ({"L0_target": 2000.5}, r"L0_target = 2000\.5 must be below F"),
        ({"method": {"v_cap": 1024}}, r"method\.v_cap = 1024 must be below F = 1024"),
        (
            {"method": {"metric": "mahalanobis", "whitening": False}},
            r"method\.metric = 'mahalanobis' needs method\.whitening",
        ),
        ({"batch_size": 1000}, r"batch_size = 1000 must be a multiple of seq_len = 128"),
        ({"total_tokens": 9 * 1024}, r"at least ten batches"),
    ],
)
def test_contradictions_name_both_sides(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(RunConfig, {**RUN, **changes}, "file.yaml")


def test_a_fault_in_a_models_override_names_the_model() -> None:
    error = refused(SWEEP, "models.demo.train", {"F": 12})
    assert "models.demo" in str(error)
    assert "L0_target = 16 must be below F = 12" in str(error)


def test_missing_keys_are_named() -> None:
    without = {k: v for k, v in RUN.items() if k != "hook_point"}
    with pytest.raises(UserError, match=r"^file\.yaml: hook_point: is missing; add it$"):
        parse(RunConfig, without, "file.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty, not a mapping"),
        (b"- 1\n- 2\n", "is a list, not a mapping"),
        (b"a: [1\n", "not valid YAML"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_files_that_are_not_a_mapping(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=words) as raised:
        load_run(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=re.escape(repr(str(path)))):
            load_run(path)


def test_configurations_are_frozen() -> None:
    config = parse(RunConfig, RUN, "file.yaml")
    for target, name in ((config, "lr"), (config.method, "capu"), (config.constants, "kappa")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, 1.0)


def test_round_trip_through_yaml_files(tmp_path: Path) -> None:
    for loader, base, model in ((load_run, RUN, RunConfig), (load_sweep, SWEEP, SweepConfig)):
        config = parse(model, base, "file.yaml")
        path = tmp_path / "again.yaml"
        path.write_text(to_yaml(config))
        assert loader(path) == config
        path.write_text(config.model_dump_json())
        assert loader(path) == config


def test_dataset_shorthand() -> None:
    short, long = (parse(RunConfig, {**RUN, "dataset": d}, "f") for d in ("a/b", {"path": "a/b"}))
    assert short == long


def test_cells_and_overrides() -> None:
    data = changed(
        SWEEP, "models.other", {"model_name": "n", "hook_point": "k", "dtype": "bfloat16"}
    )
    data = changed(data, "models.other.train", {"F": 2048})
    data = changed(data, "models.other.evaluate", {"tokens": 5})
    data = changed(data, "models.other.dataset", "else")
    data = changed(data, "method", {"capu": False})
    sweep = parse_sweep(data, "f")
    cells = list(sweep.cells())
    assert [(c.model, c.L0_target, c.seed) for c in cells[:3]] == [
        ("demo", 8.0, 0),
        ("demo", 8.0, 1),
        ("demo", 16.0, 0),
    ]
    assert len(cells) == 8
    one, other = sweep.run_config(cells[0]), sweep.run_config(cells[-1])
    assert (one.F, one.evaluate.tokens, one.dataset.path) == (1024, 131_072, "python-stdlib")
    assert (other.F, other.evaluate.tokens, other.dataset.path) == (2048, 5, "else")
    assert (other.L0_target, other.seed, other.dtype) == (16.0, 1, "bfloat16")
    assert not one.method.capu
    assert not other.method.capu


def test_seven_structural_constants_with_the_documented_defaults() -> None:
    assert StructuralConstants().model_dump() == {
        "delta_cov": 0.02,
        "delta_rank": 0.01,
        "kappa": 100.0,
        "c_eps": 0.4,
        "c_ortho": 3.0,
        "delta_drift": 0.1,
        "c_eta": 1.0,
    }


def test_every_field_of_the_schedule_is_described() -> None:
    config = parse(RunConfig, RUN, "f")
    rows = {row.name: row for row in describe(config)}
    plan = schedule(config)
    fields = {field.name for field in dataclasses.fields(Schedule)}
    assert fields <= rows.keys()
    for name in fields:
        assert rows[name].value == getattr(plan, name)
        assert rows[name].source == "config"
    assert len(rows) >= 18
    assert all(row.formula for row in rows.values())


def test_values_found_later_fill_the_list() -> None:
    config = parse(RunConfig, RUN, "f")
    unknown = {row.name for row in describe(config) if row.value is None}
    assert {"v_cap", "alpha", "whitener_rank", "init_scale", "tau_start"} <= unknown
    rows = {r.name: r for r in describe(config, {"alpha": 0.5, "not_a_parameter": 1})}
    assert rows["alpha"].value == 0.5
    assert "not_a_parameter" not in rows


@pytest.mark.parametrize("total_tokens", [10_240, 100_000, 1_000_000, 10**9])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1024, 128), (960, 96), (4096, 4096)])
def test_blocks_are_whole_pairs_of_batches_and_hold_the_promised_buffer(
    total_tokens: int, batch_size: int, seq_len: int
) -> None:
    sizes = {"total_tokens": total_tokens, "batch_size": batch_size, "seq_len": seq_len}
    if total_tokens < 10 * batch_size:
        pytest.skip("refused")
    plan = schedule(parse(RunConfig, {**RUN, **sizes}, "f"))
    assert plan.block_tokens % (2 * batch_size) == 0
    assert plan.block_tokens % seq_len == 0
    assert 2 * plan.block_tokens <= max(2**20, 4 * batch_size)
    if total_tokens == 10**9 and batch_size != 960:
        assert 2 * plan.block_tokens == 2**20


def test_bandwidths_follow_the_length_of_phase_one() -> None:
    def at(total_tokens: int) -> Schedule:
        return schedule(parse(RunConfig, {**RUN, "total_tokens": total_tokens}, "f"))

    assert at(10**9).omega_c == 0.01
    assert at(20 * 1024).omega_c == 0.05
    medium = at(2000 * 1024)
    assert medium.omega_c == pytest.approx(40 / 1940)
    assert medium.omega_o == pytest.approx(5 * medium.omega_c)
    assert medium.k_s == pytest.approx(medium.omega_c / 2)


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys, spalf, spalf.config, spalf.errors\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_user_errors_are_one_line() -> None:
    error = UserError("a.b", "x\ny", "do\n  this")
    assert str(error) == "a.b = 'x\\ny': do this"
    assert str(UserError("a.b", None, "do this")) == "a.b: do this"


def test_json_schema_can_be_generated() -> None:
    text = json.dumps(SweepConfig.model_json_schema())
    assert "L0_target" in text


def test_defaults_brought_by_a_merge_are_not_keys_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "base: &base {lr: 1, F: 2}\nouter: {x: &x {<<: *base, lr: 3}}\ny: {<<: *x, lr: 4}\n"
    )
    assert read_mapping(path)["y"] == {"lr": 4, "F": 2}
