"""Which state of a language model and of a dataset a run reads, and how it stays with it.

A name on the hub stands for whatever is there today. A run asks once, writes the commit down, and
reads that commit ever after. Files on disk are known by their contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spalf.checkpoint import sha256
from spalf.config import RunConfig
from spalf.data import is_on_hub
from spalf.hub import commit_of
from spalf.models import identifying_files, resolve_model

RECORD = "sources.json"
"""In the working directory of a calibration: what it reads, until it is finished."""


@dataclass(frozen=True)
class Sources:
    """The state of the model and of the dataset that a run reads.

    Attributes:
        asked: names and revisions as the configuration has them.
        model: of the hub, a commit; of a directory, a digest of its files.
        commit: of a hub model, the same; ``None`` for a directory.
        dataset: commit of a hub dataset; ``None`` for any other.
        files: of a directory, size, time of change and digest of each file, by name.
    """

    asked: dict[str, str | None]
    model: str
    commit: str | None = None
    dataset: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def pinned(self, config: RunConfig) -> RunConfig:
        """``config`` with commits in the place of revisions that may move."""
        dataset = config.dataset.model_copy(
            update={"revision": self.dataset or config.dataset.revision}
        )
        return config.model_copy(
            update={"revision": self.commit or config.revision, "dataset": dataset}
        )

    def inputs(self) -> dict[str, str]:
        """What a fingerprint says of them."""
        found = {"model": self.model}
        return {**found, "dataset": self.dataset} if self.dataset else found

    def to_json(self) -> dict[str, Any]:
        """As a JSON mapping that `find_sources` takes back."""
        return asdict(self)


def find_sources(config: RunConfig, recorded: Mapping[str, Any] | None = None) -> Sources:
    """What ``config`` names, as it was when that was first asked.

    Args:
        config: the run.
        recorded: what an earlier call gave, as JSON; its commits hold as long as the
            configuration asks for the same, and its digests for files of the same size and time.

    Raises:
        UserError: a bundled model or a local directory that does not exist or is incomplete.
    """
    asked = {
        "model_name": config.model_name,
        "revision": config.revision,
        "dataset": config.dataset.path,
        "dataset_revision": config.dataset.revision,
    }
    known = dict(recorded or {})
    directory = Path(resolve_model(config.model_name))
    if known.get("asked") == asked:
        commit, dataset = known.get("commit"), known.get("dataset")
    else:
        commit, dataset = _commits(config, directory)
    if directory.is_dir():
        files = _digests(directory, known.get("files") or {})
        return Sources(asked, _digest(files), None, dataset, files)
    return Sources(asked, commit or config.revision or "default", commit, dataset)


def _commits(config: RunConfig, directory: Path) -> tuple[str | None, str | None]:
    """Of the model and of the dataset, as far as they are on the hub."""
    model = dataset = None
    if not directory.is_dir():
        model = commit_of(config.model_name, config.revision, "model")
    if is_on_hub(config.dataset):
        dataset = commit_of(config.dataset.path, config.dataset.revision, "dataset")
    return model, dataset


def recorded_sources(out: Path, working: Path) -> dict[str, Any] | None:
    """What a calibration, finished or not, has written down."""
    for path in (out / "metadata.json", working / RECORD):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content["sources"] if path.name == "metadata.json" else content
            if isinstance(found["asked"], dict):
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _digests(directory: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each identifying file; one of the same size and time as before is not read again."""
    found = {}
    for path in identifying_files(directory):
        status = path.stat()
        facts: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        before = known.get(path.name, {})
        unchanged = all(before.get(name) == value for name, value in facts.items())
        facts["sha256"] = before["sha256"] if unchanged else sha256(path)
        found[path.name] = facts
    return found


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{name} {facts['sha256']}\n" for name, facts in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
