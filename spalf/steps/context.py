"""What a step is given besides its configuration and files, and what all steps share."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from spalf.config import RunConfig
from spalf.models import LanguageModel, load_model

logger = logging.getLogger(__name__)

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
    """

    device: torch.device
    should_stop: Callable[[], bool]
    progress: Callable[[str, int, int], Progress]
    commit: str = ""

    def load_model(self, config: RunConfig) -> LanguageModel:
        """The run's language model with its site, on the context's device."""
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
    """The settings a trained SAE depends on: everything but evaluation, paths and runtime."""
    return config.model_dump(
        mode="json", exclude={"runtime", "output_dir", "checkpoint", "evaluate"}
    )


def environment(context: StepContext) -> dict[str, str]:
    """Hardware and versions, for the metadata of a result."""
    cuda = context.device.type == "cuda"
    found = {"python": platform.python_version(), "commit": context.commit}
    found["device"] = torch.cuda.get_device_name(context.device) if cuda else "cpu"
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the lock of a step's working directory; wait for another holder to finish.

    A job orphaned by a killed workflow and its resubmitted twin would otherwise write the same
    files. The lock is the kernel's, so it goes with the process that held it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is working in %s; waiting for it to finish", directory)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class CheckpointClock:
    """Says when the next checkpoint is due, by steps and by minutes."""

    def __init__(self, every_minutes: float, every_steps: int | None) -> None:
        self._seconds, self._steps = 60 * every_minutes, every_steps
        self._last = time.monotonic()

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
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
