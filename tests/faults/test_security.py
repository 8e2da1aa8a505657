"""What a configuration says is data: never a command, a path out of the results, or code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from spalf.config import SweepConfig, parse_sweep
from spalf.errors import UserError
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
    import json

    assert json.loads(given)["model_name"] == name
    assert json.loads(given)["dataset"]["path"] == name


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


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_package_has_no_way_to_run_data(pattern: str) -> None:
    found = []
    for path in [*ROOT.glob("spalf/**/*.py"), *ROOT.glob("workflow/**/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.split("#")[0]
            if re.search(pattern, code) and ".eval()" not in code:
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_a_pickle_named_safetensors_is_not_loaded(tmp_path: Path) -> None:
    import os
    import pickle

    from spalf.models import load_model, resolve_model

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
    """In shell lines every placeholder that can hold the configuration's text is quoted."""
    shell = re.compile(r"\{((?:params|input|output|log|wildcards)[^}]*)\}")
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        lines = path.read_text(encoding="utf-8").splitlines()
        commands = [line for line in lines if re.match(r'\s+"( |exec |spalf )', line)]
        for found in shell.findall("\n".join(commands)):
            assert found.endswith(":q"), (path.name, found)
