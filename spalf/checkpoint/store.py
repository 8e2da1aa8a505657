"""Resumable checkpoints of one long step: the newest sound one is found, the last two are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spalf.checkpoint.files import FORMAT_VERSION, Checkpoint, read_checkpoint, write_checkpoint
from spalf.errors import UserError

logger = logging.getLogger(__name__)

KEEP = 2


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued.

    Args:
        settings: every setting the step's result depends on.
        inputs: digests of the files it reads, by name.

    Returns:
        A flat JSON mapping with the format version.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "format_version": FORMAT_VERSION,
        "settings": hashlib.sha256(text.encode()).hexdigest(),
        **{f"input.{name}": digest for name, digest in sorted(inputs.items())},
    }


class CheckpointStore:
    """A directory of checkpoints named by step.

    Attributes:
        directory: holds ``step_<step>`` directories; made when first written.
        identity: `fingerprint` of the run; checkpoints of another one are ignored.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, dict(identity)

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Write the checkpoint of ``step`` and drop all but the last two.

        Raises:
            OSError: not writable; earlier checkpoints are untouched.
        """
        metadata = {**checkpoint.metadata, "fingerprint": self.identity}
        path = self.directory / f"step_{step:09d}"
        write_checkpoint(path, Checkpoint(checkpoint.tensors, metadata))
        for old in self._steps()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, device: torch.device | str) -> Checkpoint | None:
        """The newest checkpoint that is whole and belongs to this run, or ``None``.

        Damaged and foreign checkpoints are skipped with a warning that names them.
        """
        for path in reversed(self._steps()):
            try:
                checkpoint = read_checkpoint(path, device)
            except UserError as error:
                logger.warning("skipping a damaged checkpoint: %s", error)
                continue
            differing = self._differences(checkpoint.metadata.get("fingerprint", {}))
            if not differing:
                return checkpoint
            logger.warning("ignoring %s: it differs in %s", path, ", ".join(differing))
        return None

    def clear(self) -> None:
        """Delete every checkpoint of this run's directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("step_*"))

    def _differences(self, other: Mapping[str, Any]) -> list[str]:
        keys = sorted(self.identity.keys() | other.keys())
        return [key for key in keys if self.identity.get(key) != other.get(key)]
