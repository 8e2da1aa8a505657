"""Profiles, requests, GPUs of one machine, locks, status: what takes no cluster to check."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalf.config import parse_sweep
from spalf.report.grid import describe_status
from spalf.report.status import describe_stopped, sweep_status
from tests.workflow.conftest import ROOT, SMALL, Sweep
from tests.workflow.test_steps import run_config
from workflow import executor, lock, resources
from workflow.resources import Site, measured_site

LAUNCH = ROOT / "workflow" / "scripts" / "launch.py"
MEASURED = {
    "model": {"d_model": 768, "d_vocab": 50_304},
    "measured": {"harvest_tokens_per_second": 1e5},
}


def test_profile_is_found_where_the_users_command_looks() -> None:
    assert (ROOT / "slurm").is_symlink()
    assert (ROOT / "slurm" / "config.yaml").samefile(ROOT / "workflow/profiles/slurm/config.yaml")


def test_a_sweep_runs_after_ten_lines() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (.+)$", page.split("\n\nModel and data set", 1)[0], re.MULTILINE)
    assert len(lines) <= 10
    named = {word for line in lines for word in line.split() if word.endswith(".yaml")}
    assert {path for path in named if (ROOT / path).exists()} == named - {"my-sweep.yaml"}
    assert lines[-2] == "snakemake --profile slurm --configfile my-sweep.yaml"


@pytest.mark.parametrize("profile", ["slurm", "default", "local-gpus"])
def test_profiles_agree_on_what_reruns(profile: str) -> None:
    text = (ROOT / "workflow/profiles" / profile / "config.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    if profile == "slurm":  # takes the rest from profiles/default, which wins where both name a key
        default = ROOT / "workflow/profiles/default/config.yaml"
        assert not settings.keys() & yaml.safe_load(default.read_text(encoding="utf-8")).keys()
    else:
        assert settings["rerun-triggers"] == ["input", "mtime", "params"]
        assert settings["keep-going"] and settings["rerun-incomplete"]


def test_site_block_uncommented_is_valid_yaml() -> None:
    lines = (ROOT / "slurm/config.yaml").read_text(encoding="utf-8").splitlines()
    start, end = lines.index("# set-resources:"), lines.index("#   dashboard: *gpu")
    block = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[start : end + 1]))
    rules = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "workflow/rules").glob("*.smk")
    )
    with_gpu = re.findall(
        r"^rule (\w+):(?:(?!^rule ).)*? gpu=gpus(?:_of.*?)?,", rules, re.MULTILINE | re.DOTALL
    )
    # These are the steps whose memory and time are computed, and grow with each retry.
    assert len(with_gpu) == rules.count("mem_mb=memory(") == rules.count("runtime=minutes(")
    assert set(block["set-resources"]) == set(with_gpu) >= {"calibrate", "phase1", "evaluate"}
    assert block["set-resources"]["evaluate"] == {"gpu_model": "a100"}


def test_measurement_takes_the_place_of_the_guess(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    assert measured_site(path) is None
    path.write_text("{}", encoding="utf-8")
    assert measured_site(path) is None
    path.write_text(json.dumps(MEASURED), encoding="utf-8")
    assert measured_site(path) == Site(768, 50_304, 1e5)


def test_time_follows_the_measured_rate() -> None:
    config = run_config(total_tokens=10**9, F=12288)
    slow, fast = Site(768, 50_304, 1e4), Site(768, 50_304, 1e6)
    extra = {
        name: resources.minutes("phase1", config, site=site) - resources.FIXED_MINUTES
        for name, site in (("slow", slow), ("fast", fast))
    }
    assert extra["slow"] == pytest.approx(100 * extra["fast"], rel=0.01)
    # 970 M tokens through the model alone take 970 s at 1 M tokens/s; the margin is three times.
    assert extra["fast"] > 970 * resources.MEASURED_MARGIN / 60


def test_no_step_asks_for_more_than_the_site_allows() -> None:
    config = run_config(total_tokens=10**10, F=65536)
    assert resources.minutes("phase1", config, attempt=3) > 600
    assert resources.minutes("phase1", config, attempt=3, limit=600) == 600


def test_memory_follows_the_measured_width() -> None:
    config = run_config(F=12288)
    narrow, wide = Site(256, 50_304), Site(4096, 50_304)
    assert resources.memory_mb("phase1", config, site=narrow) < resources.memory_mb(
        "phase1", config, site=wide
    )


def test_dag_of_five_hundred_cells(sweep: Sweep) -> None:
    models = {f"m{i}": SMALL["models"]["tiny"] for i in range(9)}  # and the configuration's own
    sweep.configure(models=models, grid={"L0_target": list(range(2, 12)), "seed": list(range(5))})
    planned = sweep.planned()
    assert planned["calibrate"] == 10
    assert planned["phase1"] == 500


def test_reports_on_a_thousand_cells_fit_a_command_line(sweep: Sweep) -> None:
    """The kernel takes no argument above 128 KiB, and a rule's command is one."""
    names = [f"a-model-with-a-long-name-{i}" for i in range(10)]
    tiny = SMALL["models"]["tiny"]
    grid = {"L0_target": list(range(2, 12)), "seed": list(range(10))}
    sweep.configure(models={name: tiny for name in names}, grid=grid)
    config = yaml.safe_load((sweep.directory / "config.yaml").read_text(encoding="utf-8"))
    del config["models"]["tiny"]
    (sweep.directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for place in (cell.place for cell in parse_sweep(config, "config.yaml").cells()):
        for file in ("evaluation.json", "phase1/metrics.jsonl", "phase2/metrics.jsonl"):
            write(sweep.directory / "results" / place / file)
    rules = ("aggregate", "tables", "figures", "all")
    result = sweep.run("--allowed-rules", *rules, "--quiet", "all")
    assert result.returncode == 0, result.stdout
    assert sorted(call[0] for call in sweep.calls()) == ["aggregate", "figures", "tables"]
    assert max(len("\t".join(call)) for call in sweep.calls()) < 2**14


def launched(
    locks: Path, gpus: str, script: str, at_once: int = 1, **environment: str
) -> subprocess.Popen[str]:
    options = ["--gpu-locks", str(locks), "--at-once", str(at_once)]
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), *options, sys.executable, "-c", script],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("at_once", "shown"), [(1, "35"), (2, "35"), (3, "3535"), (4, "3535")])
def test_steps_side_by_side_share_gpus_evenly(tmp_path: Path, at_once: int, shown: str) -> None:
    hold = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); input()"
    running, given = [], ""
    for _ in shown:
        running.append(launched(tmp_path, "3,5", hold, at_once))
        assert running[-1].stdout is not None
        running[-1].stdout.readline()
        given += running[-1].stdout.readline().strip()
    assert given == shown
    waiting = launched(tmp_path, "3,5", hold, at_once)
    time.sleep(0.3)
    assert waiting.poll() is None
    running[0].send_signal(signal.SIGKILL)  # the lock goes with the process
    running[0].communicate()
    assert waiting.communicate("\n", timeout=120)[0].splitlines()[1] == "3"
    for process in running[1:]:
        process.communicate("\n")


@pytest.mark.parametrize(("at_once", "each"), [(2, 1), (3, 2), (4, 2)])
def test_profile_of_several_gpus_deals_steps_over_them(
    sweep: Sweep, tmp_path: Path, at_once: int, each: int
) -> None:
    """Two GPUs, four cells: at most so many steps at a time, and no more of them on either GPU."""
    sweep.configure(runtime={"device": "auto"}, grid={"L0_target": [2, 3, 4, 5]})
    target = [f"results/tiny/L0_{n}/seed_0/init/metadata.json" for n in (2, 3, 4, 5)]
    profile = ["--workflow-profile", "local-gpus", "--resources", f"gpu={at_once}", "--cores", "32"]
    log = tmp_path / "gpus"
    environment = {"STUB_GPUS": str(log), "CUDA_VISIBLE_DEVICES": "3,5"}
    begun = str(1 + at_once)  # the calibration, and as many steps as should meet
    result = sweep.run(*profile, "--", *target, STUB_BEGUN=begun, **environment)
    assert result.returncode == 0, result.stdout
    held = {"3": 0, "5": 0}
    most, in_all = 0, 0
    for event in log.read_text(encoding="utf-8").split():
        held[event[1:]] += 1 if event[0] == "+" else -1
        most, in_all = max(most, *held.values()), max(in_all, sum(held.values()))
    assert (most, in_all) == (each, at_once)
    assert not any(held.values())
    assert len(sweep.calls()) == 5


def test_default_profile_runs_one_gpu_step_at_a_time(sweep: Sweep, tmp_path: Path) -> None:
    sweep.configure(runtime={"device": "auto"}, grid={"L0_target": [2, 3]})
    target = [f"results/tiny/L0_{n}/seed_0/init/metadata.json" for n in (2, 3)]
    log = tmp_path / "gpus"
    result = sweep.run("--cores", "8", "--", *target, STUB_GPUS=str(log))
    assert result.returncode == 0, result.stdout
    assert log.read_text(encoding="utf-8").split() == ["+", "-"] * 3


@pytest.mark.parametrize(
    ("gpus", "environment"), [("3", {}), ("3,5", {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n2"})]
)
def test_an_assigned_gpu_is_left_alone(
    tmp_path: Path, gpus: str, environment: dict[str, str]
) -> None:
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    said = launched(tmp_path / "locks", gpus, script, **environment).communicate(timeout=120)[0]
    place = "job 7 on n2" if environment else f"job - on {socket.gethostname()}"
    assert said.splitlines() == [f"{place}, GPU {gpus}", gpus]
    assert not (tmp_path / "locks").exists()


def test_lock_is_explained(tmp_path: Path) -> None:
    assert "snakemake --unlock" in lock.message(tmp_path)
    lock.note_holder(tmp_path)
    assert "that is running" in lock.message(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    holder = {"pid": gone.pid, "host": socket.gethostname()}
    (tmp_path / lock.HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    assert "was killed" in lock.message(tmp_path)
    assert "snakemake --unlock" in lock.message(tmp_path)
    (tmp_path / lock.HOLDER).write_text('{"pid": 1, "host": "elsewhere"}', encoding="utf-8")
    assert "on elsewhere, process 1" in lock.message(tmp_path)


def test_lock_left_by_a_killed_run_is_explained_by_the_next(finished: Sweep) -> None:
    (finished.directory / "results/tiny/L0_4/seed_0/evaluation.json").unlink()
    locks = finished.directory / ".snakemake" / "locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text(
        "results/tiny/L0_4/seed_0/evaluation.json\n", encoding="utf-8"
    )
    refused = finished.run()
    assert refused.returncode == 1
    assert "was killed: run `snakemake --unlock`" in refused.stdout
    assert finished.run("--unlock").returncode == 0
    assert finished.run().returncode == 0


class Executor:
    """Answers for a job, or for none when the controller is away."""

    def __init__(self, answers: bool = True) -> None:
        self._status_query_calls, self._answers = 0, answers

    async def check_active_jobs(self, jobs: list[str]) -> AsyncIterator[str]:
        if self._answers and jobs:
            self._status_query_calls += 1
            yield jobs[0]

    def get_python_executable(self) -> str:
        return sys.executable


SAID = {"1": "CANCELLED by 1000", "2": "PREEMPTED", "3": "RUNNING"}


async def query_job_status(command: str, logger: object) -> tuple[dict[str, str] | None, float]:
    return (SAID if command else None), 0.5


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the Slurm plugin, mended."""
    made: Any = types.ModuleType(executor.PLUGIN)
    made.Executor = type("Mended", (Executor,), {})
    made.query_job_status = query_job_status
    made.pending_jobs_for_rule = lambda dag, rule_name: 3
    monkeypatch.setitem(sys.modules, executor.PLUGIN, made)
    executor.mend()
    executor.mend()  # twice is once
    return made


@pytest.mark.parametrize(("answers", "kept"), [(True, ["a"]), (False, ["a", "b"])])
def test_jobs_without_an_answer_are_asked_about_again(
    plugin: Any, answers: bool, kept: list[str]
) -> None:
    async def ask() -> list[str]:
        asked = plugin.Executor(answers).check_active_jobs(["a", "b"])
        return [job async for job in asked]

    assert asyncio.run(ask()) == kept


@pytest.mark.parametrize(
    ("command", "states"),
    [
        ("squeue --name x", {"1": "CANCELLED", "2": "CANCELLED", "3": "RUNNING"}),
        ("sacct --name x", {"1": "CANCELLED", "2": "PREEMPTED", "3": "RUNNING"}),
        ("", None),
    ],
)
def test_states_are_in_words_that_the_plugin_knows(
    plugin: Any, command: str, states: dict[str, str] | None
) -> None:
    assert asyncio.run(plugin.query_job_status(command, None)) == (states, 0.5)


def test_no_job_of_an_array_is_put_aside(plugin: Any) -> None:
    assert plugin.pending_jobs_for_rule(None, "init") == 0


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/opt/venv/bin/python", "/opt/venv/bin/python"),
        ("/opt/my venv/bin/python", "'/opt/my venv/bin/python'"),
    ],
)
def test_interpreter_is_one_word(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, path: str, word: str
) -> None:
    monkeypatch.setattr(sys, "executable", path)
    assert plugin.Executor().get_python_executable() == word


def test_the_installed_plugin_has_what_is_mended() -> None:
    script = (
        "import snakemake_executor_plugin_slurm as slurm\n"
        "import snakemake_executor_plugin_slurm_jobstep as jobstep\n"
        "from workflow import executor\n"
        "executor.mend()\n"
        "for owner, name in [(slurm.Executor, 'check_active_jobs'), (slurm, 'query_job_status'),\n"
        "    (slurm, 'pending_jobs_for_rule'),\n"
        "    (slurm.Executor, 'get_python_executable'),\n"
        "    (jobstep.Executor, 'get_python_executable')]:\n"
        "    assert getattr(owner, name).__wrapped__, name\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_failed_cell_is_named_at_the_end(sweep: Sweep) -> None:
    result = sweep.run("--quiet", "all", STUB_FAIL="phase2")
    assert result.returncode == 1
    assert "2 steps failed or stopped" in result.stdout
    assert "tiny L0_4 seed_0 phase2 stopped: the stub was told to fail" in result.stdout
    assert "log: results/tiny/L0_4/seed_0/logs/phase2.log" in result.stdout


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_status_says_which_job_node_reason_and_log(tmp_path: Path) -> None:
    assert "nothing was started" in describe_status(tmp_path)
    cell = tmp_path / "tiny" / "L0_4" / "seed_0"
    write(tmp_path / "tiny/calibration/metadata.json", "{}")
    write(cell / "init/metadata.json", "{}")
    write(cell / "logs/init.log", "job 3 on n2\n")
    write(cell / "logs/phase1.log", "job 7 on n3, GPU 0\n12:00:00 INFO phase 1: 10/100\n")
    slurm = tmp_path / "logs/slurm/rule_phase1/tiny_4_0"
    write(slurm / "5.log", "slurmstepd: error: *** JOB 5 ON n2 CANCELLED AT 1 ***\n")
    text = "slurmstepd: error: *** JOB 7 ON n3 CANCELLED AT 12:01 DUE TO TIME LIMIT ***\n"
    write(slurm / "7.log", text)
    by_step = {status.step: status for status in sweep_status(tmp_path)}
    assert set(by_step) == {"calibrate", "init", "phase1"}
    assert by_step["init"].state == "done"
    stopped = by_step["phase1"]
    assert (stopped.job, stopped.node, stopped.state) == ("7", "n3", "stopped")
    assert stopped.reason == "CANCELLED AT 12:01 DUE TO TIME LIMIT"
    assert stopped.logs == (cell / "logs/phase1.log", slurm / "7.log")
    assert describe_status(tmp_path).startswith("steps: 2 done, 1 stopped\n")
    assert describe_stopped(tmp_path).startswith("1 step failed or stopped")


@pytest.mark.parametrize("words", ["oom_kill event", "StepId=8.0 exceeded memory limit (3 > 2)"])
def test_status_of_a_job_that_never_got_to_its_step(tmp_path: Path, words: str) -> None:
    cell = tmp_path / "tiny" / "L0_4" / "seed_0"
    write(cell / "logs/phase1.log", "job 7 on n3\nspalf: stopped after step 9\n")
    write(tmp_path / "logs/slurm/rule_phase1/tiny_4_0/8.log", f"{words}\n")
    (status,) = sweep_status(tmp_path)
    assert (status.job, status.node, status.reason) == ("8", "", "out of memory")
