"""Which learning rate a baseline keeps: the best fit, on tokens that judge nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spalf.interchange import SAELensSAE

LOWEST_FACTOR = 0.25
"""Thresholds are not scaled below this to compare rates at one L0."""


@dataclass(frozen=True)
class Score:
    """How an SAE does on the selection tokens.

    Attributes:
        l0: with the thresholds SAELens saved.
        explained_variance: with the same.
        matched_explained_variance: explained variance with all thresholds scaled by
            ``threshold_factor``, so that rates that reached different L0 can be compared.
        threshold_factor: the factor at which L0 is the target; 1 where there are no thresholds.
    """

    l0: float
    explained_variance: float
    matched_explained_variance: float
    threshold_factor: float


@torch.no_grad()
def score(sae: SAELensSAE, activations: list[Tensor], l0_target: float) -> Score:
    """Measure ``sae`` on batches of activations ``[tokens, d_model]``."""
    l0, explained = measure(sae, activations)
    if not sae.has_thresholds:
        return Score(l0, explained, explained, 1.0)
    factor = _matching_factor(sae, activations, l0_target)
    _, matched = measure(sae.scaled_thresholds(factor), activations)
    return Score(l0, explained, matched, factor)


@torch.no_grad()
def measure(sae: SAELensSAE, activations: Iterable[Tensor]) -> tuple[float, float]:
    """L0 and explained variance 1 − E‖x−x̂‖²/E‖x−E x‖² over batches ``[tokens, d_model]``."""
    tokens, active, error, square = 0, 0.0, 0.0, 0.0
    total: Tensor | float = 0.0
    for x in activations:
        z = sae.encode(x)
        exact = x.to(torch.float64)
        active += float((z != 0).sum())
        error += float((exact - sae.decode(z)).square().sum())
        square += float(exact.square().sum())
        total = total + exact.sum(dim=0)
        tokens += x.shape[0]
    mean = torch.as_tensor(total) / tokens
    variance = square / tokens - float(mean.square().sum())
    return active / tokens, 1 - error / tokens / variance


def _matching_factor(sae: SAELensSAE, activations: list[Tensor], l0_target: float) -> float:
    """The factor on θ at which L0 is the target: a quantile of pre/θ over tokens and features."""
    ratios, tokens = [], 0
    for x in activations:
        pre = sae.pre_activations(x).relu()
        ratio = pre / sae.threshold.clamp_min(torch.finfo(torch.float32).tiny)
        ratios.append(ratio[ratio > LOWEST_FACTOR])
        tokens += x.shape[0]
    candidates, wanted = torch.cat(ratios), round(tokens * l0_target)
    if candidates.numel() <= wanted:
        return LOWEST_FACTOR
    return float(torch.sort(candidates, descending=True).values[wanted])
