"""What a configuration says is data: never a command, a path out of the results, or code."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from spalf.config import SweepConfig, parse_sweep
from spalf.errors import UserError
from spalf.models import resolve_model
from tests.faults.harness import run
from tests.workflow.conftest import ROOT, Sweep, stub_bin, sweep

__all__ = ["stub_bin", "sweep"]

HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a; touch pwned",
    "a' ; touch pwned; '",
    'a" ; touch pwned; "',
    "a && touch pwned",
    "with some spaces",
    "{wildcards.model}",
    "{{braces}}",
    "../../elsewhere",
    "~root",
    "$HOME/model",
    "-rf",
    "naïve–ünïcode",
    "100%",
    "a\\b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_just_a_name(name: str, sweep: Sweep) -> None:
    """A model and a dataset of that name reach the step as they were written."""
    models = {"tiny": {"model_name": name, "hook_point": "blocks.0.hook_resid_post"}}
    sweep.configure(models=models, dataset=name, grid={"L0_target": [4]})
    result = sweep.run("--quiet", "all", "--until", "calibrate")
    assert result.returncode == 0, result.stdout
    assert not list(sweep.directory.rglob("pwned")) and not Path("pwned").exists()
    settings = next(call for call in sweep.calls() if call[0] == "calibrate")
    given = settings[settings.index("--settings") + 1]
    assert json.loads(given)["model_name"] == name
    assert json.loads(given)["dataset"]["path"] == name


def test_no_step_runs_what_a_name_says(sweep: Sweep) -> None:
    """A model's, a dataset's and a tokenizer's branch, through every rule to the figures."""
    name = " ".join(text for text in HOSTILE if not text.startswith((".", "-")))
    models = {"tiny": {"model_name": name, "hook_point": "blocks.0", "revision": name}}
    sweep.configure(models=models, dataset=name, grid={"L0_target": [4]})
    result = sweep.run("--quiet", "all")
    assert result.returncode == 0, result.stdout
    assert not list(sweep.directory.rglob("pwned")) and not Path("pwned").exists()
    told = {
        call[0]: json.loads(call[call.index("--settings") + 1])
        for call in sweep.calls()
        if "--settings" in call
    }
    assert set(told) >= {
        "calibrate",
        "init",
        "phase1",
        "phase2",
        "evaluate",
        "aggregate",
        "figures",
    }
    for step, settings in told.items():
        model = settings["models"]["tiny"] if "models" in settings else settings
        assert model["model_name"] == model["revision"] == name, step


def _sweep(label: str) -> dict[str, object]:
    return {
        "models": {label: {"model_name": "a", "hook_point": "blocks.0.hook_resid_post"}},
        "dataset": "python-stdlib",
        "grid": {"L0_target": [4]},
        "train": {"F": 256, "total_tokens": 65_536, "batch_size": 512, "seq_len": 64},
    }


@pytest.mark.parametrize(
    "label",
    [
        "..",
        ".",
        "../up",
        "a/../../b",
        "/etc",
        "a/b",
        "",
        "a b",
        "a\n",
        "a\x00",
        "-rf",
        "$(touch x)",
    ],
)
def test_a_label_cannot_leave_the_results(label: str) -> None:
    with pytest.raises(UserError):
        parse_sweep(_sweep(label), "sweep.yaml")
    assert SweepConfig.model_validate(_sweep("a..b"))  # dots within a name are no way up


def test_a_key_given_twice_ends_the_workflow_with_status_2(sweep: Sweep) -> None:
    path = sweep.directory / "config.yaml"
    text = path.read_text(encoding="utf-8")
    first = text.splitlines().index("grid:") + 1
    path.write_text(f"{text}grid: {{L0_target: [4]}}\n", encoding="utf-8")
    result = sweep.run("--dry-run", "--quiet", "all")
    assert result.returncode == 2, result.stdout
    last = len(text.splitlines()) + 1
    expected = f"config = 'config.yaml': key 'grid' is given twice, at lines {first} and {last}"
    assert expected in result.stdout
    assert "Traceback" not in result.stdout
    assert not (sweep.directory / "results").exists()


def test_a_tag_in_a_sweep_runs_nothing(sweep: Sweep) -> None:
    """Snakemake itself reads the file first, and refuses it."""
    path = sweep.directory / "config.yaml"
    path.write_text('models: !!python/object/apply:os.system ["touch pwned"]\n', encoding="utf-8")
    result = sweep.run("--dry-run", "--quiet", "all")
    assert result.returncode == 1 and "not valid" in result.stdout
    assert "Traceback" not in result.stdout
    assert not (sweep.directory / "pwned").exists()


def test_a_hostile_label_ends_the_workflow_with_status_2(sweep: Sweep) -> None:
    models = {"../up": {"model_name": "a", "hook_point": "blocks.0.hook_resid_post"}}
    sweep.configure(models=models)
    text = (sweep.directory / "config.yaml").read_text()
    (sweep.directory / "config.yaml").write_text(text)
    result = sweep.run("--dry-run")
    assert result.returncode == 2, result.stdout
    assert not (sweep.directory / "results").exists()


def test_code_that_comes_with_a_model_is_off_unless_asked_for() -> None:
    config = next(iter(parse_sweep(_sweep("a"), "s").cells()))
    assert parse_sweep(_sweep("a"), "s").run_config(config).trust_remote_code is False


@pytest.mark.parametrize(("allowed", "runs"), [(None, False), (False, False), (True, True)])
def test_code_that_comes_with_a_model_runs_only_if_the_configuration_says_so(
    allowed: bool | None, runs: bool, tmp_path: Path
) -> None:
    model, marker, config = tmp_path / "model", tmp_path / "it_ran", tmp_path / "config.yaml"
    shutil.copytree(resolve_model("spalf/demo-2l"), model)
    description = {"model_type": "own", "auto_map": {"AutoConfig": "own_code.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(description))
    (model / "own_code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    content = {**next(iter(_sweep("a")["models"].values())), **_sweep("a")["train"]}  # type: ignore
    content |= {"model_name": str(model), "dataset": "python-stdlib", "L0_target": 4}
    content |= {"output_dir": str(tmp_path / "run"), "runtime": {"device": "cpu"}}
    content |= {} if allowed is None else {"trust_remote_code": allowed}
    config.write_text(yaml.safe_dump(content))

    def in_a_place_of_its_own() -> None:
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path / "modules")

    outcome = run(["spalf-train", str(config)], tmp_path / "errors", in_a_place_of_its_own)
    assert outcome.status == 2, outcome.errors  # it defines no such class
    assert "model_name" in outcome.lines[-1] and "Traceback" not in outcome.errors
    assert marker.exists() == runs
    assert not (tmp_path / "run").exists()


FORBIDDEN = {
    r"\bpickle\b": "pickle",
    r"\btorch\.load\(": "torch.load",
    r"yaml\.(load|unsafe_load|full_load)\(": "unsafe YAML",
    r"shell=True": "a shell",
    r"os\.system\(": "a shell",
    r"\beval\(": "eval",
    r"\bexec\(": "exec",
    r"allow_pickle=True": "pickle",
    r"trust_remote_code=True": "remote code",
}


def _code(path: Path) -> str:
    """A module's code without comments, docstrings and the words of its messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_package_has_no_way_to_run_data(pattern: str) -> None:
    found = []
    for path in [*ROOT.glob("spalf/**/*.py"), *ROOT.glob("workflow/**/*.py")]:
        for line in _code(path).splitlines():
            if re.search(pattern, line) and ".eval()" not in line:
                found.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert not found


def test_a_pickle_named_safetensors_is_not_loaded(tmp_path: Path) -> None:
    import os
    import pickle

    from spalf.models import load_model

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/pwned",)

    model = tmp_path / "model"
    shutil.copytree(resolve_model("spalf/demo-2l"), model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load_model(str(model), "blocks.0.hook_resid_post", device="cpu")
    assert not (tmp_path / "pwned").exists()


def test_rules_quote_what_the_configuration_says() -> None:
    """In shell lines every placeholder is quoted, but the rules' own words, which are several."""
    blocks = re.compile(r"^    shell:\n((?:        .*\n?)+)", re.MULTILINE)
    placeholder = re.compile(r"\{([^{}]+)\}")
    own = ("resources.launch", "resources.taking")
    quoted = 0
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        text = path.read_text(encoding="utf-8")
        shells = blocks.findall(text)
        assert len(shells) == text.count("shell:")
        for found in placeholder.findall("".join(shells)):
            assert found.endswith(":q") or found in own, (path.name, found)
            quoted += found.endswith(":q")
    assert quoted > 50
