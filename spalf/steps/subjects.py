"""What is measured and looked at: SAEs of SPALF's phases, or one in SAELens's format."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spalf.checkpoint import Checkpoint, read_checkpoint, sha256
from spalf.config import RunConfig
from spalf.errors import UserError
from spalf.evaluation import control_summary
from spalf.interchange import SAELensSAE, is_saelens_folder, read_saelens
from spalf.interchange.saelens import CONFIG_FILE, WEIGHTS_FILE
from spalf.models import LanguageModel
from spalf.sae import StratifiedSAE
from spalf.training.position import tokens_seen
from spalf.training.state import load_sae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE to be measured, and what is known of its training.

    Attributes:
        coder: the SAE.
        digests: of its files, by name.
        method: what trained it: ``spalf``, or the name of another architecture.
        lr: its peak learning rate, if that is known.
        hyperparameters: everything else that was set for it, by name.
        train_tokens: activations it was trained on, if that is known.
        multiplier: λ_faith at the end; ``None`` where nothing was constrained.
        control: how the controller did; ``None`` where there was none.
    """

    coder: StratifiedSAE | SAELensSAE
    digests: Mapping[str, str]
    method: str
    lr: float | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    train_tokens: int | None = None
    multiplier: float | None = None
    control: Mapping[str, Any] | None = None


def read_trained(path: Path, config: RunConfig, device: torch.device) -> TrainedSAE:
    """Read the directory of a phase, of a baseline, or a SAELens folder.

    Raises:
        UserError: it is missing, damaged, or of another dictionary size.
    """
    if is_saelens_folder(path):
        found = _from_saelens(path, device)
        _warn_of_another_site(path, found, config)
        return found
    checkpoint = read_checkpoint(path, device)
    state = checkpoint.metadata["state"]
    return TrainedSAE(
        coder=load_sae(checkpoint, config, device).eval(),
        digests=checkpoint.metadata["digests"],
        method="spalf",
        lr=config.lr,
        train_tokens=tokens_seen(config, state["step"], state["phase1_end"]),
        multiplier=float(checkpoint.tensors["control"]["law.multiplier"][0]),
        control=_control(path, checkpoint),
    )


def require_width(coder: StratifiedSAE | SAELensSAE, model: LanguageModel, path: Path) -> None:
    """Refuse an SAE that does not fit the site.

    Raises:
        UserError: its activations have another width.
    """
    if coder.d_model != model.d_model:
        remedy = (
            f"is for activations of width {coder.d_model}, but {model.hook_point} of {model.name} "
            f"is {model.d_model} wide"
        )
        raise UserError("--sae", str(path), remedy)


def _warn_of_another_site(path: Path, sae: TrainedSAE, config: RunConfig) -> None:
    """SAELens's names for sites are not always ours, so that this is no error."""
    known = sae.coder.cfg.metadata if isinstance(sae.coder, SAELensSAE) else {}
    theirs = known.get("hook_name")
    if theirs is not None and theirs != config.hook_point:
        logger.warning("%s was trained at %s and is put at %s", path, theirs, config.hook_point)


def _from_saelens(path: Path, device: torch.device) -> TrainedSAE:
    coder = read_saelens(path, device)
    if not (path / "metadata.json").exists():
        digests = {name: sha256(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        method = coder.cfg.metadata.get("training_architecture") or coder.cfg.architecture
        return TrainedSAE(coder, digests, str(method))
    metadata = read_checkpoint(path, device).metadata
    trained = metadata["baseline"]
    tried = [rate["lr"] for rate in trained["rates"]]
    return TrainedSAE(
        coder=coder,
        digests=metadata["digests"],
        method=metadata["method"],
        lr=trained["lr"],
        hyperparameters={**trained["hyperparameters"], **({"lr_tried": tried} if tried else {})},
        train_tokens=trained["train_tokens"],
    )


def _control(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    text = (path / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    state = checkpoint.metadata["state"]
    return {**control_summary(rows, state["phase"]), "ended_by": state["ended_by"]}
