"""Bias-corrected exponential moving averages (M11)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ema(NamedTuple):
    """A moving average before bias correction.

    Attributes:
        raw: Σ (1 − β)·βᵏ·x, the biased average.
        weight: Σ (1 − β)·βᵏ, what ``raw`` has to be divided by; a scalar.
    """

    raw: Tensor
    weight: Tensor

    @classmethod
    def zeros_like(cls, value: Tensor) -> Ema:
        """The average of nothing yet, for values shaped like ``value``."""
        return cls(torch.zeros_like(value), torch.zeros((), dtype=value.dtype, device=value.device))


def ema_update(ema: Ema, value: Tensor, beta: float) -> Ema:
    """The average after one more ``value``; β is the share kept."""
    return Ema(beta * ema.raw + (1 - beta) * value, beta * ema.weight + (1 - beta))


def ema_value(ema: Ema) -> Tensor:
    """The bias-corrected average; needs at least one update."""
    return ema.raw / ema.weight
