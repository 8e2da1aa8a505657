"""Second names for finished results, so that they outlive a workflow's clean-up.

Snakemake deletes the outputs of a job before it runs it again. Where a job went on without its
workflow (its node was cut off, its Snakemake killed) and finished just before its twin began, the
twin would have to repeat what came after the last checkpoint. It finds the result here instead.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spalf.checkpoint import identity_digest, read_checkpoint, read_metadata
from spalf.errors import UserError
from spalf.steps.context import StepContext, finished, working_directory

logger = logging.getLogger(__name__)

METADATA = "metadata.json"


def take_finished(out: Path, identity: Mapping[str, Any], context: StepContext) -> bool:
    """Whether the result of this very run is in ``out``, made by whichever process, and whole.

    Args:
        out: finished directory with ``metadata.json``.
        identity: fingerprint of the run.
        context: of the step.

    Raises:
        UserError: it is of another run, and the context says to refuse those.
    """
    restore_finished(out, identity)
    if not (out / METADATA).exists():
        return False
    try:
        metadata = read_checkpoint(out).metadata
    except UserError as error:
        logger.warning("making %s again: %s", out, error)
        return False
    return finished(out, metadata.get("fingerprint", {}), identity, context)


def keep_finished(out: Path, identity: Mapping[str, Any], context: StepContext) -> None:
    """Link the files of a finished result into the step's working directory.

    Links take no room while the result is there. Only for steps that a workflow runs, which are
    those that wait for a lock: nobody else deletes results and wants them back. Where the file
    system has no links, nothing is kept.

    Args:
        out: finished directory with ``metadata.json``, or a single file.
        identity: fingerprint of the run that made it; another run never finds it.
        context: of the step.
    """
    if context.if_locked != "wait":
        return
    kept = _kept(out, identity)
    names = [*read_metadata(out)["digests"], METADATA] if out.is_dir() else [out.name]
    try:
        shutil.rmtree(kept, ignore_errors=True)
        _link(out if out.is_dir() else out.parent, kept, names)
    except OSError as error:
        logger.debug("no second names for %s: %s", out, error)


def restore_finished(out: Path, identity: Mapping[str, Any]) -> None:
    """Put a result of this very run back that was finished and deleted since; else do nothing."""
    kept, single = _kept(out, identity), out.suffix == ".json"
    last = out.name if single else METADATA
    base = out.parent if single else out
    if (base / last).exists() or not (kept / last).exists():
        return
    files = [str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()]
    try:
        _link(kept, base, sorted(files, key=lambda name: name == last))
    except OSError as error:
        logger.debug("%s cannot be put back: %s", out, error)
        return
    logger.info("%s was finished by an earlier job", out)


def _kept(out: Path, identity: Mapping[str, Any]) -> Path:
    return working_directory(out) / f"finished_{identity_digest(identity)[:16]}"


def _link(source: Path, target: Path, names: list[str]) -> None:
    """Link files in order; the one that vouches for the others comes last."""
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.hardlink_to(source / name)
