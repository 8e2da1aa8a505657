"""The violations that carry gradient, and those the controller reads, as two named things."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CONSTRAINTS = ("faith", "drift", "ortho")
"""Order of every vector with one entry per constraint."""


class Violations(NamedTuple):
    """The violations of one step, in the order of `CONSTRAINTS`.

    Scalars with gradient, which enter the Lagrangian.

    Attributes:
        faith: of faithfulness.
        drift: of the anchors.
        ortho: of orthogonality.
    """

    faith: Tensor
    drift: Tensor
    ortho: Tensor

    def observed(self) -> Tensor:
        """What enters the filters and the controller: ``[3]``, float64, detached."""
        return torch.stack(list(self)).detach().double()
