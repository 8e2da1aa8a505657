"""What each baseline is: SAELens's own architectures with the settings its documentation gives.

Nothing is implemented here. A recipe names a SAELens training class, what follows from the run's
L0_target, and what its documentation recommends; everything else stays at SAELens's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spalf.errors import UserError

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

SAELENS_VERSION = "6.54.12"
"""The version that ``pip install 'spalf[baselines]'`` installs."""

DECAY_SHARE = 5
"""The learning rate falls linearly to 0 over the last fifth of the steps, without a warm-up before,
as in SAELens's tutorial."""


@dataclass(frozen=True)
class Shape:
    """The size of a baseline.

    Attributes:
        d_model: width of the activations.
        d_sae: dictionary size F.
        l0_target: mean number of active features per token.
        total_steps: optimiser steps.
    """

    d_model: int
    d_sae: int
    l0_target: float
    total_steps: int


def hyperparameters(method: str, shape: Shape) -> dict[str, Any]:
    """The fields of the SAELens training config that a method sets, ``d_in`` and ``d_sae`` apart.

    Raises:
        UserError: no such method, or ``topk`` with an ``L0_target`` that is no whole number.
    """
    common: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}
    if method == "batchtopk":
        return common | {"k": float(shape.l0_target)}
    if method == "topk":
        if shape.l0_target != int(shape.l0_target):
            remedy = "must be a whole number for topk, which keeps that many features of each token"
            raise UserError("L0_target", shape.l0_target, remedy)
        return common | {"k": int(shape.l0_target)}
    if method == "jumprelu":
        return common | {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": float(shape.l0_target),
            "l0_coefficient": 1.0,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
        }
    raise UserError("method", method, "no such baseline; batchtopk, topk and jumprelu are")


def schedule_of_rate(total_steps: int) -> dict[str, int]:
    """SAELens's names for the course of the learning rate, in steps."""
    return {"lr_warm_up_steps": 0, "lr_decay_steps": max(1, total_steps // DECAY_SHARE)}


def build(
    method: str, shape: Shape, settings: Mapping[str, Any], metadata: Mapping[str, Any], device: str
) -> TrainingSAE[Any]:
    """An untrained SAELens SAE; its weights come from torch's global generator.

    Args:
        method: ``batchtopk``, ``topk`` or ``jumprelu``.
        shape: its size.
        settings: what `hyperparameters` gave.
        metadata: noted in its ``cfg.json``.
        device: where it lives.

    Raises:
        UserError: SAELens is not installed.
    """
    require_saelens()
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_training_class(method)
    config = config_class(
        d_in=shape.d_model,
        d_sae=shape.d_sae,
        device=device,
        metadata=SAEMetadata(**metadata),
        **settings,
    )
    return sae_class(config)


def require_saelens() -> None:
    """Find out whether SAELens is there before anything is computed.

    Raises:
        UserError: it is not, or not of a version that the baselines were made for.
    """
    try:
        import sae_lens
    except ImportError as error:
        remedy = f"cannot be imported ({error}); baselines need it: pip install 'spalf[baselines]'"
        raise UserError("sae-lens", None, remedy) from None
    if sae_lens.__version__ != SAELENS_VERSION:
        remedy = f"baselines were made for {SAELENS_VERSION}: pip install 'spalf[baselines]'"
        raise UserError("sae-lens", sae_lens.__version__, remedy)
