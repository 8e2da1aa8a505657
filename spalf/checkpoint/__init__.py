"""Checkpoints: five files, digests, atomic replacement, and a store that keeps the last two."""

from spalf.checkpoint.files import (
    FORMAT_VERSION,
    Checkpoint,
    naming,
    read_checkpoint,
    read_metadata,
    sha256,
    write_checkpoint,
)
from spalf.checkpoint.store import (
    CheckpointStore,
    IfForeign,
    differences,
    fingerprint,
    identity_digest,
)

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointStore",
    "IfForeign",
    "differences",
    "fingerprint",
    "identity_digest",
    "naming",
    "read_checkpoint",
    "read_metadata",
    "sha256",
    "write_checkpoint",
]
