"""Which steps of a sweep are done, which run, and why the others stopped — from files alone.

Every step's log begins with the job and the node it ran on and says every few seconds how far it
is; what Slurm itself said about a job (a time limit, a lost node) is in the log of that job.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

OUTCOMES = {
    "random": "baseline/metadata.json",
    "evaluate": "evaluation.json",
    "dashboard": "dashboard.html",
}
"""What a step leaves behind when it is done, where that is not ``<step>/metadata.json``."""
CELL_STEPS = ("init", "phase1", "phase2", "baseline", "random", "evaluate", "dashboard")
SLURM_LOGS = Path("logs", "slurm")
BASELINES = ("/batchtopk", "/topk", "/jumprelu", "/random")
PLACE = re.compile(r"^job (?P<job>\S+) on (?P<node>[^\s,]+)")
SLURM_SAYS = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ (?P<reason>.*?) \*\*\*")
OUT_OF_MEMORY = re.compile(r"oom.kill|out.of.memory|exceeded .*memory limit", re.IGNORECASE)
PROGRESS = re.compile(
    r"(?P<what>[\w ]+): +(?P<done>[\d.]+[kMG]?)/(?P<total>[\d.]+[kMG]?) "
    r"\[[^<\]]*<(?P<remaining>[^,\]]*),[^\]]*\](?P<shown>.*)$"
)
QUEUED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}


@dataclass(frozen=True)
class Progress:
    """How far a step said it was, in the last line of its log that says so.

    Attributes:
        done: units of work, as written.
        total: likewise.
        remaining: hours, minutes and seconds that were left then.
        shown: further figures by name, such as ``L0``.
    """

    done: str
    total: str
    remaining: str
    shown: Mapping[str, str]


@dataclass(frozen=True)
class StepStatus:
    """One step of one cell that was started.

    Attributes:
        cell: ``<model>`` or ``<model> L0_<target> seed_<seed>``, with a variant's or a baseline's
            name after the model's; ``<model> imported <name>``.
        step: name of the step.
        state: ``done``, ``stopped``, ``running``, or what the queue says (``pending``).
        job: id of its last job; empty where no scheduler was involved.
        node: where that ran; empty where it did not get to start.
        reason: why it stopped, in the last words of Slurm or of the step.
        logs: where to read more, the step's own log first.
        folder: where its result is or will be.
        progress: how far it said it was, if it did.
    """

    cell: str
    step: str
    state: str
    job: str
    node: str
    reason: str
    logs: tuple[Path, ...]
    folder: Path
    progress: Progress | None = None

    def describe(self) -> str:
        """Two lines: what and why; where and which logs."""
        where = f"job {self.job}" if self.job else "no scheduler's job"
        where += f" on {self.node}" if self.node else ""
        logs = ", ".join(str(log) for log in self.logs)
        why = f": {self.reason}" if self.reason else ""
        return f"{self.cell} {self.step} {self.state}{why}\n    {where}; log: {logs}"


def sweep_status(results: Path) -> list[StepStatus]:
    """Every step that was started under ``results``, models and cells in order of name."""
    queue = queued_jobs()
    found = [
        _status(results, folder, step, outcome, queue) for folder, step, outcome in _steps(results)
    ]
    return [status for status in found if status]


def describe_stopped(results: Path) -> str:
    """The steps that stopped before they were done, for the end of a run; empty if none did."""
    stopped = [status for status in sweep_status(results) if status.state == "stopped"]
    if not stopped:
        return ""
    steps = "1 step" if len(stopped) == 1 else f"{len(stopped)} steps"
    lines = "\n".join(status.describe() for status in stopped)
    return f"{steps} failed or stopped; what is done is kept, the same command continues:\n{lines}"


def queued_jobs() -> Mapping[str, str]:
    """State of this user's jobs in Slurm's queue by id; empty where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--format=%A|%T"]
    try:
        rows = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (row.split("|", 1) for row in rows.splitlines() if "|" in row)
    return {job.strip(): state.strip() for job, state in pairs}


def _steps(results: Path) -> Iterator[tuple[Path, str, Path]]:
    """Folder, step and the file that says it is done, for everything that could have started."""
    for series in _series(results):
        yield series / "calibration", "calibrate", series / "calibration" / "metadata.json"
        yield series, "pack", series / "pack.json"
        for cell in sorted(series.glob("L0_*/seed_*"), key=_numbers):
            for step in CELL_STEPS:
                yield cell, step, cell / OUTCOMES.get(step, f"{step}/metadata.json")
        for sae in sorted(path for path in series.glob("imported/*") if path.is_dir()):
            yield sae, "evaluate", sae / OUTCOMES["evaluate"]


def _series(results: Path) -> Iterator[Path]:
    """The folder of each model, and in it those of its variants and baselines."""
    for model in sorted(path for path in results.glob("*") if path.is_dir()):
        yield model
        inside = {cell.parents[1] for cell in model.glob("*/L0_*/seed_*")}
        yield from sorted(inside)


def _numbers(cell: Path) -> tuple[float, float]:
    target, seed = cell.parent.name.removeprefix("L0_"), cell.name.removeprefix("seed_")
    try:
        return float(target), float(seed)
    except ValueError:
        return float("inf"), 0.0


def _status(
    results: Path, folder: Path, step: str, outcome: Path, queue: Mapping[str, str]
) -> StepStatus | None:
    log = folder / "logs" / f"{step}.log"
    job, node = _place(log)
    slurm_log = _slurm_log(results, folder, step)
    if slurm_log and (not job or int(slurm_log.stem) > int(job)):
        job, node = slurm_log.stem, ""
    logs = tuple(path for path in (log, slurm_log) if path and path.exists())
    if not logs and not outcome.exists():
        return None
    if outcome.exists():
        state, reason = "done", ""
    elif queue.get(job) in QUEUED:
        state, reason = queue[job].lower(), ""
    elif _at_work(outcome):
        state, reason = "running", ""
    else:
        state, reason = "stopped", _reason(log, slurm_log)
    parts = folder.relative_to(results).parts
    parts = parts[:-1] if step == "calibrate" else parts
    return StepStatus(" ".join(parts), step, state, job, node, reason, logs, folder, _progress(log))


def _at_work(outcome: Path) -> bool:
    """Whether a process of this machine holds the lock on a step's output."""
    out = outcome.parent if outcome.name == "metadata.json" else outcome
    try:
        text = (out.with_name(f"{out.stem}.checkpoints") / "holder.json").read_text("utf-8")
        holder = json.loads(text)
        if holder["host"] != platform.node():
            return False
        os.kill(int(holder["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _progress(log: Path) -> Progress | None:
    for line in reversed(_lines(log)):
        found = PROGRESS.search(line)
        if found:
            shown = (pair.split("=", 1) for pair in found["shown"].split() if "=" in pair)
            return Progress(found["done"], found["total"], found["remaining"], dict(shown))
    return None


def _place(log: Path) -> tuple[str, str]:
    lines = _lines(log)
    found = PLACE.match(lines[0]) if lines else None
    if not found:
        return "", ""
    return found["job"].strip("-"), found["node"]


def _slurm_log(results: Path, folder: Path, step: str) -> Path | None:
    """Slurm's log of the last job of a step that failed; those of finished ones are deleted."""
    series, *cell = _wildcards(results, folder, step)
    rule = step
    if step == "evaluate" and series.endswith(BASELINES):
        rule = "evaluate_baseline"
    elif folder.parent.name == "imported":
        rule = "evaluate_imported"
    name = "_".join([series.replace("/", "_"), *cell])
    logs = (results / SLURM_LOGS / f"rule_{rule}" / name).glob("*.log")
    numbered = [path for path in logs if path.stem.isdigit()]
    return max(numbered, key=lambda path: int(path.stem), default=None)


def _wildcards(results: Path, folder: Path, step: str) -> list[str]:
    """What Snakemake calls the series, L0 and seed of a step's folder, or the SAE's name."""
    parts = folder.relative_to(results).parts
    if folder.parent.name == "imported":
        return [parts[0], parts[-1]]
    if step == "calibrate":
        return ["/".join(parts[:-1])]
    if step == "pack":
        return ["/".join(parts)]
    return ["/".join(parts[:-2]), parts[-2].removeprefix("L0_"), parts[-1].removeprefix("seed_")]


def _reason(log: Path, slurm_log: Path | None) -> str:
    said = "\n".join(_lines(slurm_log)) if slurm_log else ""
    announced = SLURM_SAYS.findall(said)
    if announced:
        return str(announced[-1])
    if OUT_OF_MEMORY.search(said):
        return "out of memory"
    lines = [line.strip() for line in _lines(log) if line.strip() and not PLACE.match(line)]
    if not lines:
        return "it left no word"
    if PROGRESS.search(lines[-1]):
        return f"it ended without a word after: {lines[-1]}"
    return lines[-1]


def _lines(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
