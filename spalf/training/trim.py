"""The last correction of a phase: one factor on all thresholds, so that L0 is what was asked for.

While the learning rate decays the controller's authority decays with it, and what is left of a
swing in L0 stays in the weights. One scalar, solved on training tokens, takes it out. It is
recorded with the run, so that a controller that does not do its work cannot hide behind it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spalf.sae import StratifiedSAE

LOWEST_FACTOR = 0.5
"""Thresholds are never scaled below this; a run that far off has failed, and should look it."""


@torch.no_grad()
def threshold_factor(sae: StratifiedSAE, activations: Iterable[Tensor], l0_target: float) -> float:
    """The factor on every θ at which the mean L0 over ``activations`` is ``l0_target``.

    Feature j of a token is active under the factor s where pre_j/θ_j > s, so s is the
    (tokens·L0_target)-th largest of these ratios.

    Args:
        sae: trained weights.
        activations: batches ``[tokens, d_model]``.
        l0_target: wanted mean number of active features per token.

    Returns:
        The factor, at least `LOWEST_FACTOR`.
    """
    ratios, tokens = [], 0
    for x in activations:
        ratio = sae.pre_activations(x) / sae.threshold
        ratios.append(ratio[ratio > LOWEST_FACTOR])
        tokens += x.shape[0]
    candidates, wanted = torch.cat(ratios), round(tokens * l0_target)
    if candidates.numel() <= wanted:
        return LOWEST_FACTOR
    largest = torch.topk(candidates, wanted + 1, sorted=False).values
    last, next_ = torch.topk(largest, 2, largest=False).values
    return float((last + next_) / 2)


@torch.no_grad()
def trim_thresholds(sae: StratifiedSAE, factor: float) -> None:
    """Multiply every θ by ``factor``, in place."""
    sae.log_threshold.add_(torch.tensor(factor, dtype=torch.float64).log().item())
