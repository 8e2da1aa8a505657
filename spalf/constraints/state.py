"""The violation that carries gradient and the one the controller reads, as two named things."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CONSTRAINTS = ("faith", "drift", "ortho")
"""Order of every vector with one entry per constraint."""


class Violations(NamedTuple):
    """The violations of one step, in the order of `CONSTRAINTS`.

    Attributes:
        differentiable: ``[3]``, with gradient; enters the Lagrangian.
        observed: ``[3]``, float64, detached; enters the filters and the controller.
    """

    differentiable: Tensor
    observed: Tensor

    @classmethod
    def of(cls, faith: Tensor, drift: Tensor, ortho: Tensor) -> Violations:
        """Stack three scalars."""
        stacked = torch.stack([faith, drift, ortho])
        return cls(stacked, stacked.detach().double())
