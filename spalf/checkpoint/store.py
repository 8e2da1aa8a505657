"""Resumable checkpoints of one long step: the newest sound one is found, the last two are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from spalf.checkpoint.files import (
    FORMAT_VERSION,
    Checkpoint,
    parse_metadata,
    read_checkpoint,
    write_checkpoint,
)
from spalf.errors import UserError

logger = logging.getLogger(__name__)

KEEP = 2

IfForeign = Literal["refuse", "restart"]
"""What to do about a checkpoint of other settings: an error, or set it aside and start anew."""


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued.

    Args:
        settings: every setting the step's result depends on.
        inputs: digests of the files it reads, by name.

    Returns:
        A flat JSON mapping with dotted keys: the settings themselves, so that a difference can be
        named, ``input.…`` and ``format_version``.
    """
    found = {"format_version": FORMAT_VERSION, **dict(_flat(settings, ""))}
    found |= dict(_flat(inputs, "input."))
    result: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return result


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The fields in which two fingerprints differ, with both values; empty where they agree."""
    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    # Most of a digest says no more than that it differs.
    values = {k: [str(repr(side.get(k)))[:20] for side in (theirs, ours)] for k in keys}
    return ", ".join(f"{key} ({there} there, {here} here)" for key, (there, here) in values.items())


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Hex digest of a fingerprint."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class CheckpointStore:
    """A directory of checkpoints named by step.

    Attributes:
        directory: holds ``step_<step>`` directories; made when first written.
        identity: `fingerprint` of the run; checkpoints of another one are never loaded.
        if_foreign: what to do where another run's are met first.
        saved: the step that was written last, by this process; ``None`` before that.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], if_foreign: IfForeign = "refuse"
    ) -> None:
        self.directory, self.identity = directory, dict(identity)
        self.if_foreign = if_foreign
        self.saved: int | None = None

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Write the checkpoint of ``step`` and drop all but the last two.

        Raises:
            OSError: not writable; earlier checkpoints are untouched.
        """
        metadata = {**checkpoint.metadata, "fingerprint": self.identity}
        path = self.directory / f"step_{step:09d}"
        write_checkpoint(path, Checkpoint(checkpoint.tensors, metadata, checkpoint.files))
        self.saved = step
        own = [p for p in self._steps() if re.fullmatch(r"step_\d+", p.name)]
        # What claims a later step was found damaged, or this run would not be here.
        later = [p for p in own if p.name > path.name]
        for old in [*own[: own.index(path) + 1][:-KEEP], *later]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, device: torch.device | str) -> Checkpoint | None:
        """The newest checkpoint that is whole and belongs to this run, or ``None``.

        Damaged ones are skipped with a warning that names them.

        Raises:
            UserError: a checkpoint of another run is newer, and ``if_foreign`` is ``refuse``; the
                differing fields are listed.
        """
        for path in reversed(self._steps()):
            try:
                theirs = parse_metadata(path).get("fingerprint", {})
                differing = differences(theirs, self.identity)
                if not differing:
                    return read_checkpoint(path, device)
            except UserError as error:
                logger.warning("skipping a damaged checkpoint: %s", error)
                continue
            self._meet_foreign(path, theirs, differing)
        return None

    def clear(self) -> None:
        """Delete every checkpoint of this run's directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("step_*"))

    def _meet_foreign(self, path: Path, theirs: Mapping[str, Any], differing: str) -> None:
        if self.if_foreign == "refuse":
            remedy = (
                f"belongs to another run: {differing}; delete {self.directory} to start anew, "
                "or go back to its settings"
            )
            raise UserError("checkpoint", str(path), remedy)
        logger.warning("setting aside %s, of another run: %s", path, differing)
        if path.suffix == "":
            aside = path.with_name(f"{path.name}.{identity_digest(theirs)[:8]}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
