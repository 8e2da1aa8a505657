"""TensorBoard and Weights & Biases: the rows of the metrics log, where others can follow them.

Both are fed from the metrics log and hold what it holds. A run that resumes continues its curves:
TensorBoard's file is written anew from the log, which was cut back to the checkpoint; Weights &
Biases keeps what it got, and is sent no step twice.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from spalf.checkpoint.store import identity_digest
from spalf.errors import UserError

logger = logging.getLogger(__name__)

Row = Mapping[str, float | int]

GROUPS = ("g", "lambda", "rho")
"""Columns with one value for each constraint; their curves stand together."""

PROJECT = "spalf"


class Tracker(Protocol):
    """Something that is told the metrics of a run as they come."""

    def log(self, row: Row) -> None:
        """Take one row of the metrics log."""

    def close(self) -> None:
        """Write out what is left."""


class Trackers:
    """Several trackers as one; none is the usual number."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers

    def log(self, row: Row) -> None:
        """Hand a row to each."""
        for tracker in self._trackers:
            tracker.log(row)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


def require_trackers(names: Iterable[str]) -> None:
    """See that the packages behind ``runtime.trackers`` are installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            remedy = f"is not installed; pip install 'spalf[{name}]', or take it out"
            raise UserError("runtime.trackers", name, remedy)


def open_trackers(
    names: Iterable[str], out: Path, metrics: Path, identity: Mapping[str, Any]
) -> Trackers:
    """The trackers of one phase, up to date with its metrics log.

    Args:
        names: ``runtime.trackers``.
        out: output directory of the phase. TensorBoard's file goes to ``tensorboard/<phase>``
            beside it, where it outlives the checkpoints.
        metrics: the metrics log, which holds nothing beyond the state that training starts from.
        identity: what makes the run this run; another one begins new curves.

    Raises:
        UserError: a package is missing, or Weights & Biases knows no account.
    """
    wanted = tuple(dict.fromkeys(names))
    require_trackers(wanted)
    opened: list[Tracker] = []
    for name in wanted:
        if name == "tensorboard":
            tracker: Tracker | None = TensorBoard(out.parent / name / out.name)
        else:
            tracker = open_wandb(out, identity)
        if tracker is None:
            continue
        opened.append(tracker)
        for line in metrics.read_text(encoding="utf-8").splitlines():
            tracker.log(json.loads(line))
    return Trackers(opened)


def curves(row: Row) -> dict[str, float]:
    """A row's values by the name of their curve: ``l0``, ``lambda/faith``."""
    named = {}
    for column, value in row.items():
        group, _, rest = column.partition("_")
        name = f"{group}/{rest}" if group in GROUPS and rest else column
        if column != "step":
            named[name] = float(value)
    return named


class TensorBoard:
    """An event file with the curves of one phase.

    Args:
        directory: where it goes; event files of earlier attempts there are removed.
    """

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        for earlier in directory.glob("events.out.tfevents.*"):
            earlier.unlink()
        # A TensorBoard that is open forgets what it read from the earlier files.
        self._writer = SummaryWriter(str(directory), purge_step=0)

    def log(self, row: Row) -> None:
        """Write one row."""
        for name, value in curves(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases with the curves of one phase.

    Args:
        run: of `wandb.init`.
        progress: JSON file that remembers the last step sent, so that none is sent twice.
        remembered: what it says now.
    """

    def __init__(self, run: Any, progress: Path, remembered: Mapping[str, Any]) -> None:
        self._run, self._progress, self._remembered = run, progress, dict(remembered)

    def log(self, row: Row) -> None:
        """Send one row, unless that step was sent before."""
        step = int(row["step"])
        if step <= self._remembered["step"]:
            return
        self._run.log(curves(row), step=step)
        self._remembered["step"] = step
        _write(self._progress, self._remembered)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def open_wandb(out: Path, identity: Mapping[str, Any]) -> WandB | None:
    """The Weights & Biases run of a phase, continued where the phase has one.

    Account, entity, project and offline mode are taken from its environment variables
    (``WANDB_API_KEY``, ``WANDB_ENTITY``, ``WANDB_PROJECT``, ``WANDB_MODE``).

    Returns:
        ``None`` where the service cannot be reached: training is worth more than its curves,
        which are sent when the run is resumed.

    Raises:
        UserError: it knows no account.
    """
    import wandb

    directory = out.parent / "wandb"
    directory.mkdir(parents=True, exist_ok=True)
    progress = directory / f"{out.name}.json"
    remembered = _remembered(progress, identity_digest(identity))
    parts = out.resolve().parts
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name="/".join(parts[-4:]),
            group="/".join(parts[-4:-1]),
            config=dict(identity),
            id=remembered["id"],
            resume="allow",
            dir=str(out.parent),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.CommError as error:
        said = _first_line(error)
        logger.warning("Weights & Biases cannot be reached (%s); training goes on without", said)
        return None
    except wandb.errors.UsageError as error:
        said = _first_line(error).split(". ")[0]
        remedy = f"{said}; run `wandb login`, or set WANDB_MODE=offline"
        raise UserError("runtime.trackers", "wandb", remedy) from None
    _write(progress, remembered)
    place = "offline" if run.offline else run.url
    logger.info("Weights & Biases run %s: %s", remembered["id"], place)
    return WandB(run, progress, remembered)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _remembered(progress: Path, digest: str) -> dict[str, Any]:
    """What was sent for the run ``digest``; a new id where that is nothing."""
    try:
        found = json.loads(progress.read_text(encoding="utf-8"))
        if found["run"] == digest:
            return {"run": digest, "id": str(found["id"]), "step": int(found["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"run": digest, "id": uuid.uuid4().hex[:12], "step": -1}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
