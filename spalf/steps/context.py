"""What a step is given besides its configuration and files, and what all steps share."""

from __future__ import annotations

import glob
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout

from spalf.checkpoint import IfForeign, differences, naming
from spalf.config import RunConfig
from spalf.errors import Busy, Interrupted, StopRequested, UserError
from spalf.models import LanguageModel, load_model

logger = logging.getLogger(__name__)

HOLDER = "holder.json"
"""Beside a lock: who holds it."""

COST_SHARE = 0.01
"""Share of the run that checkpoints may take."""

REPORTED_PACKAGES = ("spalf", "torch", "transformers", "transformer-lens", "triton")


class Progress(Protocol):
    """A progress display."""

    def update(self, amount: int, shown: Mapping[str, float] | None = None) -> None:
        """Advance by ``amount``; ``shown`` holds figures to print beside the bar."""

    def close(self) -> None:
        """Finish the display."""


@dataclass(frozen=True)
class StepContext:
    """How a step runs, as the command line decided it.

    Attributes:
        device: where tensors live.
        should_stop: true once the process was asked to stop (SIGTERM, SIGINT).
        progress: ``progress(description, total, initial)`` opens a display.
        commit: version-control revision of the code, or an empty string.
        if_locked: ``exit`` or ``wait`` where another process is at work on the same output.
        if_foreign: ``refuse`` or ``restart`` where checkpoints of another run are found.
        skip_nonfinite: batches that training may pass over because something was not finite.
        finished_only: a step that would have to train is an error: a pack was to have done it.
        nothing_to_lose: a block in which the process may be ended at once when it is asked to
            stop, with the status that says "continue later": what can be saved is on the disk.
    """

    device: torch.device
    should_stop: Callable[[], bool]
    progress: Callable[[str, int, int], Progress]
    commit: str = ""
    if_locked: Literal["wait", "exit"] = "exit"
    if_foreign: IfForeign = "refuse"
    skip_nonfinite: int = 0
    finished_only: bool = False
    nothing_to_lose: Callable[[], AbstractContextManager[object]] = nullcontext

    def pause_point(self) -> None:
        """Where a step may be left between two pieces of work.

        Raises:
            StopRequested: the process was asked to stop.
        """
        if self.should_stop():
            raise StopRequested

    def load_model(self, config: RunConfig) -> LanguageModel:
        """The run's language model with its site, on the context's device."""
        with self.nothing_to_lose():
            return load_model(
                config.model_name,
                config.hook_point,
                backend=config.backend,
                revision=config.revision,
                dtype=config.dtype,
                device=self.device,
                trust_remote_code=config.trust_remote_code,
            )


def training_settings(config: RunConfig) -> dict[str, Any]:
    """The settings a trained SAE depends on: all but evaluation, baselines, paths and runtime."""
    return config.model_dump(
        mode="json", exclude={"runtime", "output_dir", "checkpoint", "evaluate", "baselines"}
    )


def environment(context: StepContext) -> dict[str, str]:
    """Hardware and versions, for the metadata of a result."""
    cuda = context.device.type == "cuda"
    found = {"python": platform.python_version(), "commit": context.commit}
    found["device"] = torch.cuda.get_device_name(context.device) if cuda else "cpu"
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs"
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def working_directory(out: Path) -> Path:
    """Where a step keeps its checkpoints and its lock: beside its output, not in it.

    Snakemake deletes the declared outputs of a job that failed; what lies beside them survives.
    """
    stem = out.stem if out.suffix in (".json", ".html") else out.name
    return out.with_name(f"{stem}.checkpoints")


def finished(
    out: Path, theirs: Mapping[str, Any], identity: Mapping[str, Any], context: StepContext
) -> bool:
    """Whether a finished result with the fingerprint ``theirs`` is the one wanted.

    Raises:
        UserError: it is of another run, and the context says to refuse those.
    """
    differing = differences(theirs, identity)
    if not differing:
        logger.info("%s is finished already", out)
        return True
    if context.if_foreign == "refuse":
        remedy = f"holds another run: {differing}; delete it, or give another place"
        raise UserError("--out", str(out), remedy)
    logger.warning("replacing %s, of another run: %s", out, differing)
    return False


@contextmanager
def exclusive(out: Path, context: StepContext) -> Iterator[Path]:
    """Hold the lock on a step's output, and give its working directory.

    A job orphaned by a killed workflow and its resubmitted twin would otherwise write the same
    files. The lock is the kernel's, so it goes with the process that held it. What killed
    processes left half-written is removed.

    Raises:
        Busy: another process holds it, and the context says not to wait.
        Interrupted: asked to stop while waiting.
    """
    working = working_directory(out)
    made = _make_directories(working, out)
    lock = FileLock(working / "lock")
    _acquire(lock, working, context)
    try:
        with naming(working):
            _announce(working)
        for left in [*working.rglob(".*.tmp"), *_half_written(out)]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        with naming(working):
            yield working
    except UserError:
        # Bad input leaves nothing behind that was not there before.
        if working in made:
            shutil.rmtree(working, ignore_errors=True)
        _remove_if_empty(made)
        raise
    finally:
        (working / HOLDER).unlink(missing_ok=True)
        lock.release()


def _make_directories(working: Path, out: Path) -> list[Path]:
    """Make a working directory; what of it, its parents and ``out`` was missing, deepest first."""
    missing = [path for path in (out, working, *working.parents) if not path.exists()]
    working.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_if_empty(directories: list[Path]) -> None:
    for path in directories:
        with suppress(OSError):
            path.rmdir()


def _half_written(out: Path) -> list[Path]:
    stem = working_directory(out).name.removesuffix(".checkpoints")
    return list(out.parent.glob(f".{glob.escape(stem)}.*.tmp"))


def _acquire(lock: FileLock, working: Path, context: StepContext) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        if context.if_locked == "exit":
            raise Busy(working, _holder(working)) from None
    logger.warning("%s is in use by %s; waiting for it to finish", working, _holder(working))
    while True:
        try:
            lock.acquire(timeout=1)
            return
        except Timeout:
            if context.should_stop():
                raise Interrupted(0) from None


def _announce(working: Path) -> None:
    who = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    (working / HOLDER).write_text(json.dumps(who), encoding="utf-8")


def _holder(working: Path) -> str:
    try:
        who = json.loads((working / HOLDER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


class CheckpointClock:
    """Says when the next checkpoint is due, by steps and by minutes.

    Where a checkpoint takes long, the minutes stretch, so that checkpoints cost less than a
    hundredth of the run. Steps are taken as asked.

    Args:
        every_minutes: between two checkpoints.
        every_steps: likewise; ``None`` leaves it to the minutes.
        share: of the run that checkpoints may take.
    """

    def __init__(
        self, every_minutes: float, every_steps: int | None, share: float = COST_SHARE
    ) -> None:
        self._seconds, self._steps, self._share = 60 * every_minutes, every_steps, share
        self._started = self._last = time.monotonic()
        self._spent = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure what saving one checkpoint costs."""
        before = time.monotonic()
        yield
        self._last = time.monotonic()
        cost = self._last - before
        self._spent += cost
        self._seconds = max(self._seconds, cost / self._share)
        elapsed = self._last - self._started
        logger.debug("checkpoint took %.2f s; %.2f s of %.0f s so far", cost, self._spent, elapsed)

    def due(self, step: int) -> bool:
        """Whether to checkpoint after ``step``; restarts the minutes when it says yes."""
        now = time.monotonic()
        by_steps = self._steps is not None and step % self._steps == 0
        if by_steps or now - self._last >= self._seconds:
            self._last = now
            return True
        return False


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON by atomic rename, synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
