"""The mean of the weights over the last steps, which is quieter than any of them (M16)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spalf.sae import StratifiedSAE


class WeightAverage:
    """A running mean of an SAE's weights (Polyak & Juditsky 1992).

    Attributes:
        means: by parameter, float32.
        count: how many weights they are the mean of; float32 scalar on the device.
    """

    def __init__(self, means: Mapping[str, Tensor], count: Tensor) -> None:
        self.means, self.count = dict(means), count

    @classmethod
    def of_nothing(cls, sae: StratifiedSAE) -> WeightAverage:
        """The mean before the first weights are taken in."""
        means = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
        return cls(
            {n: m.detach() for n, m in means.items()}, torch.zeros((), device=sae.W_dec.device)
        )

    @torch.no_grad()
    def add(self, sae: StratifiedSAE, unless: Tensor) -> None:
        """Take in the weights as they are now, without waiting for the device.

        Args:
            sae: whose weights.
            unless: scalar on the device; where it is 1, and not 0, nothing is taken in.
        """
        taken = 1 - unless
        self.count.add_(taken)
        share = taken / self.count.clamp_min(1)
        for name, parameter in sae.named_parameters():
            self.means[name].add_((parameter - self.means[name]) * share)

    @torch.no_grad()
    def put_into(self, sae: StratifiedSAE) -> None:
        """Replace the weights by their mean, with the free columns on the sphere again (M4)."""
        for name, parameter in sae.named_parameters():
            parameter.copy_(self.means[name])
        sae.normalise_free_columns()

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to rebuild it, by name."""
        return {**self.means, "count": self.count}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WeightAverage:
        """Inverse of `tensors`."""
        means = {name: value for name, value in tensors.items() if name != "count"}
        return cls(means, tensors["count"])
