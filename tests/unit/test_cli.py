"""The command line: one line for bad input, examples in every help, and nothing heavy too early."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

from spalf.cli import errors, main, run
from spalf.config import RunConfig, describe, parse
from spalf.errors import Busy, Diverged, Interrupted, UserError
from tests.helpers_planted import planted_config, run_phases, write_calibration

RUN: dict[str, Any] = {
    "model_name": "spalf/demo-2l",
    "hook_point": "blocks.1.hook_resid_post",
    "dataset": "python-stdlib",
    "F": 64,
    "L0_target": 8,
    "total_tokens": 40_960,
    "batch_size": 512,
    "seq_len": 64,
    "evaluate": {"tokens": 4096},
    "runtime": {"device": "cpu"},
}
COMMANDS: dict[str, click.Command] = {
    **main.spalf.commands,
    "spalf-train": run.train_command,
    "spalf-eval": run.evaluate_command,
}


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Undo what the command line sets up for its own process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads, level = torch.get_num_threads(), logging.getLogger("spalf").level
    state = torch.get_rng_state()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    logging.getLogger("spalf").setLevel(level)


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; returns its single line."""

    def run_it(command: str, *arguments: str, config: dict[str, Any] | None = None) -> str:
        given = list(arguments)
        if config is not None:
            path = tmp_path / "run.yaml"
            path.write_text(yaml.safe_dump(config), encoding="utf-8")
            given = [str(path) if a == "CONFIG" else a for a in given]
        before = written(tmp_path)
        status = errors.status_of(
            lambda: COMMANDS[command].main(given, standalone_mode=False), debug=False
        )
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == ""
        lines = [line for line in err.splitlines() if line]
        assert len(lines) == 1, err
        assert lines[0].startswith("spalf: ")
        assert "Traceback" not in err
        assert written(tmp_path) == before, "something was written"
        return lines[0]

    return run_it


def written(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"L0_tarqet": 8}, ["L0_tarqet", "did you mean 'L0_target'"]),
        ({"lr": "3e-4"}, ["lr = '3e-4'", "write 0.0003"]),
        ({"F": "many"}, ["F = 'many'", "integer"]),
        ({"method": {"v_cap": 64}}, ["method.v_cap = 64", "below F = 64"]),
        ({"L0_target": 64}, ["L0_target = 64", "below F = 64"]),
        ({"runtime": {"device": "gpu"}}, ["runtime.device = 'gpu'"]),
    ],
    ids=["unknown key", "number as text", "wrong type", "V >= F", "L0 >= F", "device"],
)
@pytest.mark.parametrize("command", ["calibrate", "init", "phase1", "spalf-train"])
def test_bad_configuration_is_one_line_and_status_two(
    refuse: Callable[..., str],
    tmp_path: Path,
    command: str,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    places = {
        "calibrate": ["--config", "CONFIG", "--out", f"{tmp_path}/out"],
        "init": ["--config", "CONFIG", "--calibration", f"{tmp_path}/c", "--out", f"{tmp_path}/o"],
        "spalf-train": ["CONFIG"],
    }
    phase = ["--init", f"{tmp_path}/init"]
    arguments = places.get(command, places["init"] + phase)
    output = {"output_dir": str(tmp_path / "results")}
    line = refuse(command, *arguments, config={**RUN, **output, **changes})
    for word in ["run.yaml", *words]:
        assert word in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hook_point": "blocks.7.hook_resid_post"}, ["hook_point = 'blocks.7", "L = 0 to 1"]),
        ({"hook_point": "nonsense"}, ["hook_point = 'nonsense'", "hook_resid_post"]),
        ({"model_name": "spalf/none"}, ["model_name = 'spalf/none'", "spalf/demo-2l"]),
        ({"dataset": "./no-such.txt"}, ["dataset = './no-such.txt'", "no such file"]),
        ({"dataset": "EMPTY"}, ["dataset", "holds no text"]),
        ({"dataset": "TINY"}, ["dataset", "too small"]),
        ({"runtime": {"device": "cuda:31"}}, ["device = 'cuda:31'", "use --device cpu"]),
    ],
    ids=["layer", "site", "model", "no dataset", "empty dataset", "small dataset", "no such GPU"],
)
@pytest.mark.parametrize("command", ["calibrate", "spalf-train"])
def test_bad_input_is_one_line_status_two_and_writes_nothing(
    refuse: Callable[..., str],
    tmp_path: Path,
    command: str,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    files = {"EMPTY": "", "TINY": "a few words"}
    config = {**RUN, "output_dir": str(tmp_path / "results"), **changes}
    if config["dataset"] in files:
        path = tmp_path / "data.txt"
        path.write_text(files[config["dataset"]])
        config["dataset"] = str(path)
    arguments = ["CONFIG"]
    if command == "calibrate":
        arguments = ["--config", "CONFIG", "--out", str(tmp_path / "results" / "calibration")]
    line = refuse(command, *arguments, config=config)
    for word in words:
        assert word in line


def test_more_anchors_than_tokens_is_found_by_init(
    refuse: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    config = planted_config(F=512, method={"v_cap": 300})
    made = write_calibration(config, tmp_path_factory.mktemp("planted") / "calibration")
    line = refuse(
        "init",
        *("--settings", config.model_dump_json()),
        *("--calibration", str(made), "--out", str(tmp_path / "init")),
    )
    assert "method.v_cap = 300: must be at most 256 here" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "NONE"], "no such file"),
        ([], "give either --config FILE or --settings JSON"),
        (["--config", "NONE", "--settings", "{}"], "give either"),
        (["--settings", "{oops"], "is not JSON"),
        (["--settings", "[1]"], "must be a JSON object"),
        (["--settings", "{}", "--runtime", "3"], "must be a JSON object"),
        (["--settings", "{}"], "is missing; add it"),
    ],
)
def test_configuration_options(
    refuse: Callable[..., str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = [str(tmp_path / "none.yaml") if a == "NONE" else a for a in arguments]
    assert words in refuse("calibrate", *given, "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("command", ["init", "phase1", "phase2", "evaluate"])
def test_missing_inputs_of_a_step_are_named(
    refuse: Callable[..., str], tmp_path: Path, command: str
) -> None:
    places = {name: str(tmp_path / f"no-{name}") for name in ("calibration", "phase1", "phase2")}
    wanted = {
        "init": ["calibration"],
        "phase1": ["calibration"],
        "phase2": ["calibration", "phase1"],
        "evaluate": ["calibration", "phase1", "phase2"],
    }[command]
    arguments = [part for name in wanted for part in (f"--{name}", places[name])]
    arguments += ["--init", str(tmp_path / "no-init")] if command == "phase1" else []
    line = refuse(
        command, "--config", "CONFIG", *arguments, "--out", str(tmp_path / "o"), config=RUN
    )
    assert "no-calibration" in line


def test_an_option_click_does_not_know(refuse: Callable[..., str]) -> None:
    assert "No such option" in refuse("calibrate", "--nope")
    assert "Missing option '--out'" in refuse("calibrate", "--settings", "{}")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
@pytest.mark.parametrize("command", ["calibrate", "spalf-train"])
def test_a_device_given_as_an_option_is_checked(
    refuse: Callable[..., str], tmp_path: Path, command: str, device: str
) -> None:
    place = ["--config", "CONFIG", "--out", str(tmp_path / "o")]
    arguments = ["CONFIG"] if command == "spalf-train" else place
    config = {**RUN, "output_dir": str(tmp_path / "results")}
    assert device in refuse(command, *arguments, "--device", device, config=config)


def test_evaluation_wants_a_checkpoint(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "checkpoint: is missing; add" in refuse("spalf-eval", "CONFIG", config=RUN)
    gone = {**RUN, "checkpoint": str(tmp_path / "gone"), "output_dir": str(tmp_path / "results")}
    (tmp_path / "results" / "calibration").mkdir(parents=True)
    (tmp_path / "results" / "calibration" / "metadata.json").write_text("{}")
    assert "checkpoint" in refuse("spalf-eval", "CONFIG", config=gone)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example(name: str) -> None:
    result = CliRunner().invoke(COMMANDS[name], ["--help"], prog_name=name)
    assert result.exit_code == 0
    example = result.output.split("Example:")[1]
    assert " ".join(example.split()).startswith(
        name if name.startswith("spalf-") else f"spalf {name} "
    )


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("spalf-train", "spalf-eval")])
def test_examples_use_options_that_exist(name: str) -> None:
    options = {option for p in COMMANDS[name].params for option in p.opts}
    used = {word for word in (COMMANDS[name].epilog or "").split() if word.startswith("--")}
    assert used <= options


def test_the_group_lists_every_step() -> None:
    steps = {"calibrate", "init", "phase1", "phase2", "evaluate", "aggregate", "tables", "figures"}
    assert steps | {"describe"} <= set(main.spalf.commands)


def described(*arguments: str) -> str:
    result = CliRunner().invoke(main.spalf, ["describe", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_describe_lists_every_derived_parameter(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    text = described(str(path))
    rows = describe(parse(RunConfig, RUN, "f"))
    assert len(rows) >= 18
    for row in rows:
        line = next(line for line in text.splitlines() if line.split()[:1] == [row.name])
        assert row.formula.split()[0] in line
        assert row.source in line
    assert "(not yet measured)" in text


def test_describe_picks_a_cell_of_a_sweep(tmp_path: Path) -> None:
    entry = {"model_name": "m", "hook_point": "h"}
    train = {k: RUN[k] for k in ("F", "total_tokens", "batch_size", "seq_len")}
    sweep = {
        "models": {"a": entry, "b": {**entry, "train": {"F": 96}}},
        "dataset": "d",
        "grid": {"L0_target": [4, 8]},
        "train": train,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    assert "a/L0_4/seed_0" in described(str(path))
    text = described(str(path), "--cell", "b/L0_8/seed_0")
    line = next(line for line in text.splitlines() if line.startswith("ortho_features"))
    assert line.split()[1] == "16"
    with pytest.raises(UserError, match="cells are a/L0_4/seed_0, a/L0_8"):
        described(str(path), "--cell", "c")


def test_describe_reads_the_measured_values_of_a_run(tmp_path: Path) -> None:
    config = planted_config(20, method={"phase2_fraction": 0.0})
    calibration = write_calibration(config, tmp_path / "calibration")
    run_phases(config, calibration, tmp_path, end_to_end=False)
    text = described(str(tmp_path / "phase1"))
    values = {line.split()[0]: line.split()[1] for line in text.splitlines()[4:] if line.strip()}
    assert float(values["init_scale"]) > 0
    assert values["v_cap"] == "4"
    with pytest.raises(UserError, match="holds no run"):
        described(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("k", 1, "do"), 2, "k = 1: do"),
        (Interrupted(7), 75, "stopped after step 7"),
        (Diverged(3, "loss", "here", "lower lr"), 1, "loss not finite at step 3 (here): lower lr"),
        (Busy("x.checkpoints", "process 7"), 75, "in use by process 7"),
        (OSError(28, "No space left on device", "/x/y"), 1, "disk is full"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y"),
        (click.UsageError("bad"), 2, "bad"),
    ],
)
def test_outcomes_have_their_exit_status_and_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int, words: str
) -> None:
    def fail() -> None:
        raise error

    assert errors.status_of(fail, debug=False) == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message


def test_debug_shows_the_traceback() -> None:
    def fail() -> None:
        raise UserError("k", 1, "do")

    with pytest.raises(UserError):
        errors.status_of(fail, debug=True)


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_cannot_be_written_is_a_failure() -> None:
    """The process ends without Python's own end, which would have noticed."""
    code = "import sys; from spalf.cli.errors import leave; sys.stdout.write('lost'); leave(0)"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full).returncode == 1
        assert subprocess.run([sys.executable, "-c", code], stderr=full).returncode == 0


def test_the_installed_command_refuses_bad_input_before_loading_torch(tmp_path: Path) -> None:
    """As a process of its own: status, streams, and which modules were imported."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "oops": 1}))
    code = (
        "import os, sys\n"
        "leave = os._exit\n"
        "def look(status):\n"
        "    os.write(1, repr(sorted({'torch', 'transformers'} & set(sys.modules))).encode())\n"
        "    leave(status)\n"
        "os._exit = look\n"
        "from spalf.cli.main import main\n"
        "main()\n"
    )
    arguments = ["calibrate", "--config", "run.yaml", "--out", "out"]
    done = python(code, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "[]"
    assert done.stderr.count("\n") == 1
    assert "oops" in done.stderr
    assert written(tmp_path) == {"run.yaml"}


def test_help_and_describe_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    code = (
        "import sys\n"
        "from spalf.cli.main import spalf\n"
        "from spalf.cli.run import train_command\n"
        "spalf.main(['describe', 'run.yaml'], standalone_mode=False)\n"
        "spalf.main(['phase1', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_runtime_option_overrides_the_file(tmp_path: Path) -> None:
    from spalf.cli.options import read_config

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "runtime": {"device": "cpu", "log_every_steps": 3}}))
    config = read_config(path, None, json.dumps({"log_every_steps": 7}), "auto")
    assert config.runtime.log_every_steps == 7
    assert config.runtime.device == "auto"
    assert read_config(path, None, "{}", None).runtime.device == "cpu"


def test_the_list_of_commands_cuts_no_sentence() -> None:
    for command in (main.spalf, main.spalf.commands["data"]):
        text = CliRunner().invoke(command, ["--help"], terminal_width=80).output
        assert "..." not in text.split("Commands:")[1].split("Example:")[0]
