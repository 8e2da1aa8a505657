"""Checkpoints: five files, digests, atomic replacement, and a store that keeps the last two."""

from spalf.checkpoint.files import FORMAT_VERSION, Checkpoint, read_checkpoint, write_checkpoint
from spalf.checkpoint.store import CheckpointStore, fingerprint

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointStore",
    "fingerprint",
    "read_checkpoint",
    "write_checkpoint",
]
