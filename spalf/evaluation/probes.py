"""Linear probes: class-balanced logistic regressions, many of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spalf.evaluation.protocols import SparseCoder

CHUNK_ELEMENTS = 2**24
"""Codes worked on at a time."""

_RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe a column: row i of x is taken for label ℓ where x_i·direction_ℓ + bias_ℓ > 0.

    Attributes:
        direction: ``[width, labels]``.
        bias: ``[labels]``.
    """

    direction: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """``[n, width]`` → ``[n, labels]``."""
        return x @ self.direction + self.bias


def fit_probes(x: Tensor, labels: Tensor, max_iterations: int = 100) -> Probes:
    """One class-balanced ridge-penalised logistic probe per column of ``labels [n, labels]``.

    Inputs of more than average variance are brought down to it, so that a few huge ones do not
    hold up the fit; small ones are never blown up, so that probes do not live on noise.
    """
    mean, std = x.mean(dim=0), x.std(dim=0)
    scale = std.clamp(min=float(std.square().mean().sqrt()) + 1e-12)
    inputs, target = (x - mean) / scale, labels.float()
    positive = target.mean(dim=0).clamp(1e-6, 1 - 1e-6)
    weight = torch.where(labels, 0.5 / positive, 0.5 / (1 - positive))
    w = x.new_zeros(x.shape[1], labels.shape[1], requires_grad=True)
    b = x.new_zeros(labels.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        fit = F.binary_cross_entropy_with_logits(inputs @ w + b, target, weight, reduction="none")
        # Each label is a problem of its own, hence the sum over labels.
        loss = fit.mean(dim=0).sum() + 0.5 * _RIDGE * w.square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimiser.step(closure)
    direction = w.detach() / scale[:, None]
    return Probes(direction, b.detach() - mean @ direction)


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """(sensitivity + specificity)/2 of each column; both ``[n, labels]`` bool."""
    hits = (predicted & labels).sum(dim=0) / labels.sum(dim=0)
    rejections = (~predicted & ~labels).sum(dim=0) / (~labels).sum(dim=0)
    return (hits + rejections) / 2


def f1_score(predicted: Tensor, labels: Tensor) -> Tensor:
    """2·hits/(predicted + labelled) of each column; both ``[n, labels]`` bool."""
    hits = (predicted & labels).sum(dim=0).float()
    return 2 * hits / (predicted.sum(dim=0) + labels.sum(dim=0)).clamp(min=1)


def chunks(x: Tensor, sae: SparseCoder) -> Iterator[tuple[slice, Tensor]]:
    """Rows of activations ``x`` and their codes ``[rows, d_sae]``, a few at a time."""
    size = max(1, CHUNK_ELEMENTS // sae.W_dec.shape[0])
    for start in range(0, x.shape[0], size):
        rows = slice(start, min(start + size, x.shape[0]))
        yield rows, sae.encode(x[rows]).float()


def codes_on_host(x: Tensor, sae: SparseCoder, features: Tensor) -> Tensor:
    """Codes of a few features in the host's memory, ``[n, len(features)]``.

    Probes of a few features are many and small: a GPU would wait for the launch of every one of
    the thousands of kernels that fit them.
    """
    return torch.cat([codes[:, features].cpu() for _, codes in chunks(x, sae)])


def most_correlated(
    x: Tensor,
    sae: SparseCoder,
    labels: Tensor,
    count: int,
    merit: Callable[[Tensor], Tensor] = lambda correlation: correlation,
) -> Tensor:
    """The features whose codes go best with each label: int64 ``[labels, count]``, best first.

    Args:
        x: activations ``[n, d_model]``.
        sae: whose features they are.
        labels: bool ``[n, labels]``.
        count: features wanted for each label; fewer where the dictionary is smaller.
        merit: what of a correlation counts, such as ``torch.abs``.
    """
    n, d_sae = labels.shape[0], sae.W_dec.shape[0]
    sums = x.new_zeros(labels.shape[1], d_sae)
    total, squares = x.new_zeros(2, d_sae)
    for rows, z in chunks(x, sae):
        sums += labels[rows].float().T @ z
        total += z.sum(dim=0)
        squares += z.square().sum(dim=0)
    share = labels.float().mean(dim=0)[:, None]
    spread = (squares / n - (total / n).square()).clamp(min=0).sqrt()
    covariance = sums / n - share * (total / n)
    correlation = torch.where(spread > 0, merit(covariance / spread), -torch.inf)
    return correlation.topk(min(count, d_sae), dim=1).indices
