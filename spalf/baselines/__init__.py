"""Baselines that SAELens trains on SPALF's own stream of activations."""

from spalf.baselines.recipes import SAELENS_VERSION, hyperparameters, require_saelens
from spalf.baselines.selection import Score
from spalf.baselines.train import (
    BaselineResult,
    Trained,
    selection_activations,
    train_baseline,
)

__all__ = [
    "SAELENS_VERSION",
    "BaselineResult",
    "Score",
    "Trained",
    "hyperparameters",
    "require_saelens",
    "selection_activations",
    "train_baseline",
]
