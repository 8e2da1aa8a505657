"""The five-file checkpoint directory: four of tensors, one of metadata with their digests (I10)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.errors import UserError

FORMAT_VERSION = 2
"""Raised whenever a checkpoint written before could be misread."""

METADATA = "metadata.json"
_SELF = "metadata_digest"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        tensors: by file stem (``model``, ``tensors``, ``control``, ``optimizer``), then by name.
        metadata: JSON-serialisable; ``format_version`` and ``digests`` are added when written.
        files: other files that belong to it, by name; they are copied in, and digested.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint directory so that a reader finds either all of it or none.

    Everything goes to a temporary sibling, is synced, and is renamed into place. Where the
    directory exists already (Snakemake makes the directories of declared outputs), the files move
    into it one by one and ``metadata.json``, which vouches for the others, comes last. A file of
    ``checkpoint.files`` that lies in ``directory`` already stays there and is only digested.

    Args:
        directory: final place.
        checkpoint: what to write.

    Raises:
        OSError: the disk is full or not writable; nothing in ``directory`` has changed then.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    with naming(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write_files(temporary, checkpoint, directory)
            _move_into_place(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give every failure of the file system the path it is about.

    Python leaves it out of the error of a failed write, and safetensors has an error of its own.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_files(directory: Path, checkpoint: Checkpoint, final: Path) -> None:
    digests = {}
    for stem, tensors in checkpoint.tensors.items():
        path = directory / f"{stem}.safetensors"
        owned = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(owned, path)
        digests[path.name] = sha256(path)
        _sync(path)
    for name, source in checkpoint.files.items():
        path = source if source == final / name else directory / name
        if path != source:
            shutil.copyfile(source, path)
        digests[name] = sha256(path)
        _sync(path)
    given = {**checkpoint.metadata, "format_version": FORMAT_VERSION, "digests": digests}
    metadata = json.loads(json.dumps(given))  # as it will be read back
    metadata[_SELF] = _metadata_digest(metadata)
    path = directory / METADATA
    path.write_text(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)
    for tensors_file in directory.glob("*.safetensors"):
        # safetensors lets nobody but the owner read them; they are as public as the rest.
        tensors_file.chmod(path.stat().st_mode)


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
        stems: files of tensors to read, and no other file; ``None`` reads all there are.

    Returns:
        The checkpoint, equal bit for bit to the one written.

    Raises:
        UserError: a file is missing, truncated, altered or of another format version; it is named.
    """
    metadata = read_metadata(directory)
    tensors, files = {}, {}
    for name, digest in metadata["digests"].items():
        path = directory / name
        if path.suffix != ".safetensors":
            if stems is None:
                _verify(path, digest)
                files[name] = path
        elif stems is None or path.stem in stems:
            tensors[path.stem] = _read_tensors(path, digest, device)
    return Checkpoint(tensors, metadata, files)


def read_metadata(directory: Path) -> dict[str, Any]:
    """``metadata.json`` of a checkpoint directory.

    Raises:
        UserError: missing, altered, not JSON, or of another format version.
    """
    metadata = parse_metadata(directory)
    if metadata.get("format_version") != FORMAT_VERSION:
        found = metadata.get("format_version")
        remedy = f"has checkpoint format {found}, not {FORMAT_VERSION}; run its step again"
        raise UserError("checkpoint", str(directory / METADATA), remedy)
    return metadata


def parse_metadata(directory: Path) -> dict[str, Any]:
    """`read_metadata` for any format version.

    Raises:
        UserError: missing, altered or not JSON.
    """
    path = directory / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("checkpoint", str(path), "is missing; run its step again") from None
    except OSError as error:
        raise UserError("checkpoint", str(path), f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError("checkpoint", str(path), "is damaged; delete its directory") from None
    if not isinstance(metadata, dict):
        raise UserError("checkpoint", str(path), "is damaged; delete its directory")
    # Format 1 had no digest of its own.
    if metadata.get("format_version") != 1 and metadata.get(_SELF) != _metadata_digest(metadata):
        raise UserError("checkpoint", str(path), "does not match its digest; it was altered")
    return metadata


def _metadata_digest(metadata: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in metadata.items() if k != _SELF}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_tensors(path: Path, digest: str, device: torch.device | str) -> dict[str, Tensor]:
    _verify(path, digest)
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", str(path), f"cannot be read: {error}") from None


def _verify(path: Path, digest: str) -> None:
    try:
        if sha256(path) != digest:
            raise UserError("checkpoint", str(path), "does not match its digest; it was altered")
    except FileNotFoundError:
        raise UserError("checkpoint", str(path), "is missing; run its step again") from None
    except OSError as error:
        raise UserError("checkpoint", str(path), f"cannot be read: {error.strerror}") from None


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
