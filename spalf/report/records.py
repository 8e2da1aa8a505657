"""The files that training and evaluation leave behind, as typed data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from spalf.errors import UserError

_TEXT = ("model", "hook_point", "method", "variant")
_REDO = "; delete it and run the step that writes it again"


class _Record(BaseModel):
    """A mapping of which the named fields are read and the rest is left to other readers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CellRecord(_Record):
    """Which autoencoder was evaluated.

    Attributes:
        method: ``spalf``, or the baseline it is.
        variant: name of the variant of the method; empty where nothing was varied.
        lr: peak learning rate, where it is known.
        hyperparameters: what else was set for this autoencoder, by name.
    """

    model: str
    hook_point: str
    model_name: str
    method: str
    variant: str = ""
    lr: float | None = None
    hyperparameters: dict[str, Any] = {}
    L0_target: float
    R2_target: float
    F: int
    seed: int


class Metrics(_Record):
    """One phase's result on held-out tokens; cross-entropies and KL in nats per token.

    Attributes ending in ``_se`` are standard errors over sequences.
    """

    l0: float
    l0_se: float | None = None
    explained_variance: float
    mse: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    delta_ce: float
    delta_ce_se: float | None = None
    ce_recovered: float
    kl: float
    kl_se: float | None = None
    dead_fraction: float
    dense_fraction: float | None = None
    lambda_faith: float | None = None
    tokens: int
    train_tokens: int | None = None


class Evaluation(_Record):
    """One ``evaluation.json``."""

    cell: CellRecord
    phases: dict[str, Metrics]
    final: str


def evaluation_digest(report: Mapping[str, Any]) -> str:
    """Digest of an ``evaluation.json``'s content; the field ``digest`` that holds it left out."""
    text = json.dumps({k: v for k, v in report.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_evaluation(path: Path) -> Evaluation:
    """Read one ``evaluation.json``.

    Raises:
        UserError: the file is missing, empty, not JSON, altered, or lacks a field; the message
            names both.
    """
    text = _text(path)
    try:
        evaluation = Evaluation.model_validate_json(text)
    except ValidationError as error:
        raise UserError(str(path), None, f"{_fault(error)}{_REDO}") from None
    # One that another program wrote has none.
    report = json.loads(text)
    if report.get("digest", evaluation_digest(report)) != evaluation_digest(report):
        raise UserError(str(path), None, f"does not match its digest; it was altered{_REDO}")
    if evaluation.final not in evaluation.phases:
        remedy = f"final phase {evaluation.final!r} is not among its phases{_REDO}"
        raise UserError(str(path), None, remedy)
    return evaluation


def read_metrics(path: Path) -> pd.DataFrame:
    """Read one ``metrics.jsonl``: a row per logged step, columns as logged.

    Raises:
        UserError: the file is missing, empty, or a line is not a JSON object with the columns
            that the figures draw.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path}:{number}", None, f"is not JSON{_REDO}") from None
        missing = [] if isinstance(row, dict) else ["a JSON object"]
        missing = missing or [name for name in ("step", "tokens", "phase", "l0") if name not in row]
        if missing:
            raise UserError(f"{path}:{number}", None, f"lacks {', '.join(missing)}{_REDO}")
        rows.append(row)
    return pd.DataFrame(rows)


def read_frontier(path: Path) -> pd.DataFrame:
    """Read a table that `spalf.report.aggregate` wrote; a ``variant`` is text, empty for none.

    Raises:
        UserError: the file is missing, empty or not such a table.
    """
    _text(path)
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str))
    except (pd.errors.ParserError, UnicodeDecodeError, ValueError):
        raise UserError(str(path), None, f"is not a table in CSV{_REDO}") from None
    missing = [name for name in ("model", "method", "L0_target", "seed") if name not in table]
    if missing:
        raise UserError(str(path), None, f"lacks the columns {', '.join(missing)}{_REDO}")
    if table.empty:
        raise UserError(str(path), None, f"has no rows{_REDO}")
    if "variant" not in table:
        table["variant"] = ""
    return table.assign(variant=table["variant"].fillna(""))


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), None, "no such file; run the step that writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), None, f"cannot be read ({error}){_REDO}") from None
    if not text.strip():
        raise UserError(str(path), None, f"is empty{_REDO}")
    return text


def _fault(error: ValidationError) -> str:
    """The first fault of a validation error as a phrase."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "json_invalid":
        return "is not valid JSON"
    return f"lacks {key}" if fault["type"] == "missing" else f"has {key}: {fault['msg'].lower()}"
