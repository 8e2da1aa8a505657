"""Malformed input of every kind: one line with key, value and remedy, status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.harness import Outcome, in_child, run
from tests.helpers_models import save_tiny_model

SOUND: dict[str, Any] = {
    "model_name": "spalf/demo-2l",
    "hook_point": "blocks.1.hook_resid_post",
    "dataset": "python-stdlib",
    "F": 128,
    "L0_target": 8,
    "total_tokens": 65_536,
    "batch_size": 512,
    "seq_len": 64,
    "runtime": {"device": "cpu"},
}


def _config(*removed: str, **changes: Any) -> bytes:
    data = {k: v for k, v in {**SOUND, **changes}.items() if k not in removed}
    return yaml.safe_dump(data).encode()


@dataclass(frozen=True)
class Case:
    """A file given to ``spalf-train``, and what its error must speak of."""

    name: str
    content: bytes
    expected: tuple[str, ...]


def _case(name: str, expected: str, content: bytes) -> Case:
    return Case(name, content, tuple(expected.split("|")))


FILES = [
    _case("empty", "is empty|not a mapping", b""),
    _case("only a comment", "is empty", b"# nothing here\n"),
    _case("a list", "is a list|not a mapping", b"- F: 128\n- lr: 3\n"),
    _case("a scalar", "is a str|not a mapping", b"hello"),
    _case("a number", "is a int|not a mapping", b"42"),
    _case("unclosed bracket", "not valid YAML|line", b"F: [1, 2\nlr: 3\n"),
    _case("a tab", "not valid YAML|line 2", b"F: 128\n\tlr: 3\n"),
    _case("two documents", "not valid YAML", b"F: 128\n---\nF: 64\n"),
    _case("an object tag", "not valid YAML", b"!!python/object/apply:os.system ['touch pwned']\n"),
    _case("a name tag", "not valid YAML", b"F: !!python/name:os.system\n"),
    _case("latin-1", "not UTF-8|byte", "model_name: caf\xe9\n".encode("latin-1")),
    _case("utf-16", "not UTF-8", "F: 128\n".encode("utf-16")),
    _case("zero bytes", "not valid YAML", b"F: \x00\x00\n"),
    _case("an impossible date", "not valid YAML", b"seed: 2026-13-45\n"),
    _case("a number of 5000 digits", "not valid YAML", b"F: " + b"9" * 5000),
    _case("a deep nest", "not valid YAML", b"[" * 20_000),
    _case("a key that is a list", "not valid YAML", b"? [1, 2]\n: 3\n"),
    _case("a numeric key", "1", b"1: 2\n"),
    _case("a key given twice", "key 'F' is given twice, at lines 1 and 3", b"F: 1\nlr: 2\nF: 3\n"),
    _case("twice on one line", "key 'F' is given twice, at line 1", b'{"F": 1, "F": 2}'),
    _case(
        "twice within a section",
        "key 'capu' is given twice, at lines 2 and 4",
        b"method:\n  capu: true\n  v_cap: 3\n  capu: false\n",
    ),
    _case("twice, once in quotes", "key 'F' is given twice, at lines 1 and 2", b"F: 1\n'F': 2\n"),
    _case("twice in an item of a list", "key 'a' is given twice", b"x: [{a: 1, a: 2}]\n"),
]

FIELDS = [
    _case("unknown key", "L0_traget|did you mean 'L0_target'", _config(L0_traget=8)),
    _case(
        "unknown nested key", "method.capuu|did you mean 'capu'", _config(method={"capuu": True})
    ),
    _case("nothing like it", "zzz|known keys are", _config(zzz=1)),
    _case("no F", "F|missing", _config("F")),
    _case("no model_name", "model_name|missing", _config("model_name")),
    _case("no hook_point", "hook_point|missing", _config("hook_point")),
    _case("no dataset", "dataset|missing", _config("dataset")),
    _case("no total_tokens", "total_tokens|missing", _config("total_tokens")),
    _case("F is text", "F = '128'|integer", _config(F="128")),
    _case("F is a float", "F = 128.5|integer", _config(F=128.5)),
    _case("F is true", "F = True|integer", _config(F=True)),
    _case("F is null", "F|integer", _config(F=None)),
    _case("F is 0", "F = 0|greater than 0", _config(F=0)),
    _case("F is negative", "F = -1|greater than 0", _config(F=-1)),
    _case("F is absurd", "F = 100000|less than", _config(F=10**12)),
    _case("F is a list", "F = [128]|integer", _config(F=[128])),
    _case("L0 at F", "L0_target = 128|below F = 128", _config(L0_target=128)),
    _case("L0 is 0", "L0_target = 0|greater than 0", _config(L0_target=0)),
    _case("L0 is text", "L0_target = 'many'|number", _config(L0_target="many")),
    _case("lr as YAML reads 3e-4", "lr = '3e-4'|write 0.0003", b"lr: 3e-4\n" + _config()),
    _case("lr is 0", "lr = 0|greater than 0", _config(lr=0)),
    _case("lr is negative", "lr = -0.001|greater than 0", _config(lr=-0.001)),
    _case("lr is NaN", "lr = nan|finite", _config(lr=float("nan"))),
    _case("lr is infinite", "lr = inf|finite", _config(lr=float("inf"))),
    _case("lr is 5", "lr = 5|less than or equal", _config(lr=5.0)),
    _case("R2 above 1", "R2_target = 1.5|less than 1", _config(R2_target=1.5)),
    _case("R2 is 0", "R2_target = 0|greater than 0", _config(R2_target=0)),
    _case("batch is 0", "batch_size = 0|greater than 0", _config(batch_size=0)),
    _case("batch off the grid", "batch_size = 500|multiple of seq_len", _config(batch_size=500)),
    _case("too few tokens", "total_tokens = 1024|ten batches", _config(total_tokens=1024)),
    _case("sequences of 1", "seq_len = 1|greater than or equal to 2", _config(seq_len=1)),
    _case("seed is negative", "seed = -1|greater than or equal", _config(seed=-1)),
    _case("seed is a float", "seed = 1.5|integer", _config(seed=1.5)),
    _case("seed is a date", "seed|integer", b"seed: 2026-01-01\n" + _config()),
    _case("seed beyond 32 bits", "seed = 4294967296|less than", _config(seed=2**32)),
    _case("model_name is empty", "model_name = ''", _config(model_name="")),
    _case("model_name is a number", "model_name = 7|string", _config(model_name=7)),
    _case("model_name with a newline", "model_name", _config(model_name="a\nb")),
    _case("hook_point is a list", "hook_point|string", _config(hook_point=["a"])),
    _case("dataset is a number", "dataset = 3", _config(dataset=3)),
    _case(
        "dataset with unknown key", "dataset.pth|did you mean 'path'", _config(dataset={"pth": "x"})
    ),
    _case("dataset without path", "dataset.path|missing", _config(dataset={"name": "x"})),
    _case("method is a list", "method", _config(method=[1])),
    _case("unknown surrogate", "method.surrogate = 'relu'", _config(method={"surrogate": "relu"})),
    _case("v_cap at F", "v_cap = 128|below F", _config(method={"v_cap": 128})),
    _case("v_cap is 0", "v_cap = 0|greater than 0", _config(method={"v_cap": 0})),
    _case(
        "mahalanobis without whitening",
        "mahalanobis|needs method.whitening",
        _config(method={"metric": "mahalanobis", "whitening": False}),
    ),
    _case(
        "all for phase 2", "phase2_fraction = 1|less than 1", _config(method={"phase2_fraction": 1})
    ),
    _case("kappa below 1", "constants.kappa = 0.5", _config(constants={"kappa": 0.5})),
    _case("unknown constant", "constants.gamma|known keys", _config(constants={"gamma": 1})),
    _case("a TPU", "runtime.device = 'tpu'", _config(runtime={"device": "tpu"})),
    _case("no threads", "runtime.threads = 0", _config(runtime={"threads": 0})),
    _case(
        "checkpoints every 0 minutes",
        "checkpoint_every_minutes = 0",
        _config(runtime={"checkpoint_every_minutes": 0}),
    ),
    _case(
        "remote code as text", "trust_remote_code = 'yes'|boolean", _config(trust_remote_code="yes")
    ),
    _case("float64", "dtype = 'float64'", _config(dtype="float64")),
    _case("unknown backend", "backend = 'jax'", _config(backend="jax")),
    _case("no output_dir", "output_dir = ''", _config(output_dir="")),
    _case(
        "a way out", "output_dir = 'results/../../x'|'..'", _config(output_dir="results/../../x")
    ),
    _case(
        "a factor of 0", "sweep_factors|greater than 0", _config(evaluate={"sweep_factors": [0]})
    ),
    _case(
        "evaluation tokens as text", "evaluate.tokens = 'all'", _config(evaluate={"tokens": "all"})
    ),
    _case(
        "unknown bundled model", "model_name = 'spalf/demo-9l'", _config(model_name="spalf/demo-9l")
    ),
    _case("no such model directory", "model_name = './nowhere'", _config(model_name="./nowhere")),
    _case(
        "a hub out of reach", "model_name = 'some/model'|network", _config(model_name="some/model")
    ),
    _case(
        "a layer beyond the last",
        "hook_point = 'blocks.7.hook_resid_post'|L = 0 to 1",
        _config(hook_point="blocks.7.hook_resid_post"),
    ),
    _case(
        "a hook of another architecture",
        "hook_point = 'encoder.layer.0.output'|no such site",
        _config(hook_point="encoder.layer.0.output"),
    ),
    _case(
        "no such dataset",
        "dataset = './nowhere.txt'|no such file",
        _config(dataset="./nowhere.txt"),
    ),
    _case("a dataset out of reach", "dataset = 'some/text'|network", _config(dataset="some/text")),
]


def _train(directory: Path, content: bytes) -> Outcome:
    """Run ``spalf-train`` on a file; the run's directory is ``run`` beside it."""
    config = directory / "config.yaml"
    text = content
    if b"output_dir" not in content and b"model_name" in content:
        text = content + f"output_dir: {directory}/run\n".encode()
    config.write_bytes(text)
    return run(["spalf-train", str(config)], directory.parent / "errors")


def _assert_one_line(outcome: Outcome, *expected: str) -> None:
    assert outcome.status == 2, outcome.errors
    assert "Traceback" not in outcome.errors
    said = [line for line in outcome.lines if line.startswith("spalf: ")]
    assert len(said) == 1 and outcome.lines[-1] == said[0], outcome.errors
    for text in expected:
        assert text in said[0], said[0]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("case", [*FILES, *FIELDS], ids=lambda case: case.name)
def test_a_malformed_configuration_is_one_line(case: Case, place: Path) -> None:
    outcome = _train(place, case.content)
    _assert_one_line(outcome, *case.expected)
    assert sorted(path.name for path in place.iterdir()) == ["config.yaml"]
    assert not Path("pwned").exists()


def test_the_table_is_long_enough() -> None:
    assert len(FILES) + len(FIELDS) + len(DATASETS) + len(MODELS) + len(COMMANDS) >= 60


def _text(*contents: bytes, name: str = "{}.txt") -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        directory.mkdir()
        for index, content in enumerate(contents):
            (directory / name.format(index)).write_bytes(content)
        return directory

    return make


def _rows(*rows: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        directory.mkdir()
        path = directory / "rows.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return path

    return make


DATASETS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty directory": (_text(), "holds no text"),
    "empty documents": (_text(b"", b"  \n", b"\n"), "holds no text"),
    "one-token documents": (_text(b"a", b"b"), "too small"),
    "not UTF-8": (_text(b"good text " * 50, b"\xff\xfe\xff" * 100), "not UTF-8"),
    "another column": (_rows({"body": "x"}), "text_field = 'text'|body"),
    "numbers for text": (_rows({"text": 3}, {"text": 4}), "text_field|int"),
    "broken rows": (_rows({"text": "a" * 50}, "{no json"), "cannot be read"),
    "mixed kinds": (_text(b"{}", name="a.jsonl"), "text_field|holds no text|cannot be read"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_cannot_be_used_is_one_line(name: str, place: Path) -> None:
    make, expected = DATASETS[name]
    data = make(place / "data")
    outcome = _train(place, _config(dataset=str(data)))
    _assert_one_line(outcome, "dataset")
    assert any(text in outcome.lines[-1] for text in expected.split("|")), outcome.lines[-1]
    assert not (place / "run").exists()


def test_a_huge_document_is_no_trouble(place: Path) -> None:
    data = place / "data.jsonl"
    rows = [
        {"text": "all in one line " * 200_000},
        *({"text": f"row {i} " * 100} for i in range(400)),
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    config = place / "config.yaml"
    content = {**SOUND, "dataset": str(data), "constants": {"delta_cov": 0.9}}
    config.write_text(yaml.safe_dump(content))
    out = place / "calibration"
    outcome = run(["spalf", "calibrate", "--config", str(config), "--out", str(out)], place / "err")
    assert outcome.status == 0, outcome.errors


def _without(pattern: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        for path in model.glob(pattern):
            path.unlink()

    return spoil


def _pickled(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.rename(model / "pytorch_model.bin")


def _truncated(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])


def _nonsense(model: Path) -> None:
    (model / "config.json").write_text("{")


def _small_vocabulary(model: Path) -> None:
    """The tokenizer of another model, with more tokens than this one has."""
    from spalf.models import resolve_model

    for path in Path(resolve_model("spalf/demo-2l")).glob("tokenizer*"):
        shutil.copy(path, model)


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_without("*.safetensors"), "no *.safetensors weights"),
    "no config.json": (_without("config.json"), "no config.json"),
    "no tokenizer": (_without("tokenizer*"), "its tokenizer cannot be read"),
    "pickled weights": (_pickled, "no *.safetensors weights"),
    "truncated weights": (_truncated, "its weights cannot be read"),
    "a config that is no JSON": (_nonsense, "its configuration cannot be read"),
    "a tokenizer of another model": (_small_vocabulary, "its tokenizer has 2048 tokens"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_one_line(name: str, place: Path) -> None:
    spoil, expected = MODELS[name]
    model = place / "model"
    in_child(lambda: save_tiny_model("gpt_neox", model))
    spoil(model)
    outcome = _train(place, _config(model_name=str(model)))
    _assert_one_line(outcome, "model_name", str(model), expected)
    assert not (place / "run").exists()


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no configuration": (["spalf", "init", "--calibration", "c", "--out", "o"], "--config"),
    "two configurations": (
        ["spalf", "calibrate", "--config", "c", "--settings", "{}", "--out", "o"],
        "either --config FILE or --settings JSON",
    ),
    "settings that are no JSON": (
        ["spalf", "calibrate", "--settings", "{", "--out", "o"],
        "not JSON",
    ),
    "settings that are a list": (
        ["spalf", "calibrate", "--settings", "[]", "--out", "o"],
        "must be a JSON object",
    ),
    "an unknown option": (
        ["spalf", "phase1", "--fast"],
        "No such option: --fast|No such option '--fast'",
    ),
    "an unknown command": (["spalf", "trian"], "No such command 'trian'"),
    "no output": (["spalf", "calibrate", "--settings", "{}"], "--out"),
    "a negative allowance": (["spalf", "phase1", "--skip-nonfinite", "-1"], "--skip-nonfinite"),
    "an unknown policy": (["spalf", "phase1", "--if-locked", "steal"], "--if-locked"),
    "a missing evaluation": (["spalf", "aggregate", "--out", "o", "none.json"], "none.json"),
    "a missing table": (["spalf", "tables", "--out", "o", "none.csv"], "none.csv"),
    "two sweeps": (
        ["spalf", "figures", "--out", "o", "--frontier", "f", "--sweep", "s", "--settings", "{}"],
        "either --sweep FILE or --settings JSON",
    ),
    "nothing to collect": (["spalf", "aggregate", "--out", "o"], "either --sweep FILE"),
    "no such file": (["spalf-train", "nowhere.yaml"], "nowhere.yaml"),
    "a directory for a file": (["spalf-train", "."], "directory"),
    "nothing to describe": (["spalf", "describe", "nowhere.yaml"], "no such file"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_makes_no_sense_is_one_line(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected = COMMANDS[name]
    monkeypatch.chdir(place)
    outcome = run(arguments, place.parent / "errors")
    _assert_one_line(outcome)
    assert any(text in outcome.lines[-1] for text in expected.split("|")), outcome.lines[-1]
    assert not list(place.iterdir())


def test_a_gpu_that_is_not_there(place: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    outcome = _train(place, _config(runtime={"device": "cuda:0"}))
    _assert_one_line(outcome, "device = 'cuda:0'", "--device cpu")
    assert not (place / "run").exists()


def test_more_anchors_than_the_dictionary_has(place: Path) -> None:
    config = _config(method={"v_cap": 127}, F=128, L0_target=4)
    assert b"v_cap: 127" in config  # below F, so it is allowed; at F it is in the table


def test_debug_shows_the_traceback(place: Path) -> None:
    config = place / "config.yaml"
    config.write_bytes(_config(F=0))
    outcome = run(["spalf-train", str(config), "--debug"], place / "errors")
    assert outcome.status != 0
    assert "Traceback" in outcome.errors and "UserError" in outcome.errors


@pytest.mark.parametrize("content", [_config(F=0), b"", _config(dataset="./nowhere.txt")])
def test_as_a_real_process(content: bytes, place: Path) -> None:
    config = place / "config.yaml"
    config.write_bytes(content)
    command = [sys.executable, "-c", "from spalf.cli.run import train; train()", str(config)]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("spalf: ") and result.stderr.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["config.yaml"]
