"""The five-file checkpoint directory: four of tensors, one of metadata with their digests (I10)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.errors import UserError

FORMAT_VERSION = 1
"""Raised whenever a checkpoint written before could be misread."""

METADATA = "metadata.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        tensors: by file stem (``model``, ``tensors``, ``control``, ``optimizer``), then by name.
        metadata: JSON-serialisable; ``format_version`` and ``digests`` are added when written.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, Any]


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint directory so that a reader finds either all of it or none.

    Everything goes to a temporary sibling, is synced, and is renamed into place. Where the
    directory exists already (Snakemake makes the directories of declared outputs), the files move
    into it one by one and ``metadata.json``, which vouches for the others, comes last.

    Args:
        directory: final place.
        checkpoint: what to write.

    Raises:
        OSError: the disk is full or not writable; nothing in ``directory`` has changed then.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_files(temporary, checkpoint)
        _move_into_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(directory: Path, checkpoint: Checkpoint) -> None:
    digests = {}
    for stem, tensors in checkpoint.tensors.items():
        path = directory / f"{stem}.safetensors"
        owned = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(owned, path)
        digests[path.name] = sha256(path)
        _sync(path)
    metadata = {**checkpoint.metadata, "format_version": FORMAT_VERSION, "digests": digests}
    path = directory / METADATA
    path.write_text(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _move_into_place(temporary: Path, directory: Path) -> None:
    if not directory.exists():
        temporary.rename(directory)
    else:
        (directory / METADATA).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda p: (p.name == METADATA, p.name)):
            path.replace(directory / path.name)
    _sync(directory)
    _sync(directory.parent)


def read_checkpoint(
    directory: Path, device: torch.device | str = "cpu", stems: tuple[str, ...] | None = None
) -> Checkpoint:
    """Read a checkpoint directory and verify every file against its digest.

    Args:
        directory: as written by `write_checkpoint`.
        device: where the tensors go.
        stems: files to read; ``None`` reads all of them.

    Returns:
        The checkpoint, equal bit for bit to the one written.

    Raises:
        UserError: a file is missing, truncated, altered or of another format version; it is named.
    """
    metadata = read_metadata(directory)
    tensors = {}
    for name, digest in metadata["digests"].items():
        stem = Path(name).stem
        if stems is None or stem in stems:
            tensors[stem] = _read_tensors(directory / name, digest, device)
    return Checkpoint(tensors, metadata)


def read_metadata(directory: Path) -> dict[str, Any]:
    """``metadata.json`` of a checkpoint directory.

    Raises:
        UserError: missing, not JSON, or of another format version.
    """
    path = directory / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("checkpoint", str(path), f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError("checkpoint", str(path), "is damaged; delete its directory") from None
    if not isinstance(metadata, dict) or metadata.get("format_version") != FORMAT_VERSION:
        remedy = f"is not of checkpoint format {FORMAT_VERSION}; run its step again"
        raise UserError("checkpoint", str(path), remedy)
    return metadata


def _read_tensors(path: Path, digest: str, device: torch.device | str) -> dict[str, Tensor]:
    try:
        if sha256(path) != digest:
            raise UserError("checkpoint", str(path), "does not match its digest; it was altered")
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise UserError("checkpoint", str(path), "is missing; run its step again") from None
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", str(path), f"cannot be read: {error}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
