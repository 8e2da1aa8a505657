"""What SAELens's trainers carry from step to step, as tensors and JSON.

SAELens has a way of its own to save them, which is a pickle and holds one trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spalf.checkpoint import Checkpoint

if TYPE_CHECKING:
    from sae_lens import SAETrainer

COUNTS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
RUNNING = ("act_freq_scores", "n_forward_passes_since_fired")


def to_checkpoint(trainers: Sequence[SAETrainer[Any, Any]]) -> Checkpoint:
    """The trainers between two steps, one file of tensors for each."""
    facts = [_facts(trainer) for trainer in trainers]
    tensors = {f"rate_{index}": _tensors(trainer) for index, trainer in enumerate(trainers)}
    return Checkpoint(tensors, {"trainers": json.loads(json.dumps(facts))})


def from_checkpoint(saved: Checkpoint, trainers: Sequence[SAETrainer[Any, Any]]) -> int:
    """Inverse of `to_checkpoint`, into new trainers of the same kind; going on is bit-identical.

    Returns:
        Steps done.
    """
    for index, (trainer, facts) in enumerate(
        zip(trainers, saved.metadata["trainers"], strict=True)
    ):
        _restore(trainer, saved.tensors[f"rate_{index}"], facts)
    return int(trainers[0].n_training_steps)


def _tensors(trainer: SAETrainer[Any, Any]) -> dict[str, Tensor]:
    found = {f"sae.{name}": value for name, value in trainer.sae.state_dict().items()}
    found |= {name: getattr(trainer, name) for name in RUNNING}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        found |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    return found


def _facts(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    coefficients = trainer.coefficient_schedulers.items()
    return {
        "counts": {name: getattr(trainer, name) for name in COUNTS},
        "lrs": [group["lr"] for group in trainer.optimizer.param_groups],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: scheduler.state_dict() for name, scheduler in coefficients},
    }


def _restore(
    trainer: SAETrainer[Any, Any], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    trainer.sae.load_state_dict(_part(tensors, "sae."))
    for name in RUNNING:
        getattr(trainer, name).copy_(tensors[name])
    for name, value in facts["counts"].items():
        setattr(trainer, name, value)
    adam = trainer.optimizer.state_dict()
    indices = {int(name.split(".")[1]) for name in tensors if name.startswith("adam.")}
    adam["state"] = {index: _part(tensors, f"adam.{index}.") for index in sorted(indices)}
    trainer.optimizer.load_state_dict(adam)
    trainer.lr_scheduler.load_state_dict(facts["lr_scheduler"])
    for group, lr in zip(trainer.optimizer.param_groups, facts["lrs"], strict=True):
        group["lr"] = lr
    for name, state in facts["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
