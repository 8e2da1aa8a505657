"""Keeps a run's state finite, and finds out afterwards what was not, without slowing the run.

The first step whose loss or gradient is not finite changes nothing, nor does any step after it,
until somebody looks. That is decided on the device, so no step waits for the host; the host looks
where it reads the device anyway, and then takes back its count of the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spalf.training.state import TrainState


class FiniteGuard:
    """Freezes the weights at the first step that is not finite.

    Args:
        device: where the run's tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        # 0 while all is well, NaN from the first bad step on: 0·∞ and 0·NaN are NaN.
        self._poison = torch.zeros((), device=device)
        self._found = torch.zeros((), device=device)
        self._stalled = torch.zeros((), device=device)
        self._overflow = torch.zeros((), dtype=torch.bool, device=device)
        self.overflowed = False
        """Whether the last `rewind` undid steps whose lists of active entries were too short."""

    @property
    def found(self) -> Tensor:
        """1 from the first bad step on, else 0; float32 scalar on the device."""
        return self._found

    def observe(self, loss: Tensor, gradient_norm: Tensor, overflow: Tensor | None = None) -> None:
        """Take in the scalars of one step, before its update.

        Args:
            loss: of the step.
            gradient_norm: likewise.
            overflow: whether its forward pass was void for want of room, bool.
        """
        self._poison.add_(loss.detach() + gradient_norm, alpha=0.0)
        if overflow is not None:
            self._overflow |= overflow
            self._poison.masked_fill_(overflow, torch.nan)
        self._found.copy_(self._poison.isnan())
        self._stalled.add_(self._found)

    @property
    def stalled_steps(self) -> Tensor:
        """Steps from the first bad one on, 0 if there was none; float32 scalar on the device."""
        return self._stalled

    def stalled(self) -> int:
        """The same as a plain number; waits for the device."""
        return int(self._stalled.item())

    def keep(self, before: Tensor, after: Tensor) -> Tensor:
        """``before`` if the run is frozen, else ``after``."""
        return torch.where(self._found != 0, before, after)

    def update(self, optimizer: torch.optim.Adam) -> None:
        """Step the optimiser, which is a fused one, unless the run is frozen."""
        # Read by the fused kernel itself, as a gradient scaler would set it.
        optimizer.found_inf = self._found  # type: ignore[attr-defined]
        optimizer.step()

    def rewind(self, state: TrainState) -> bool:
        """Put ``state`` back to before the first bad step since the last call, if there was one.

        Returns:
            Whether there was.
        """
        stalled = self.stalled()
        if not stalled:
            return False
        self.overflowed = bool(self._overflow.item())
        self._overflow.zero_()
        state.step -= stalled
        for tensor in (self._poison, self._found, self._stalled):
            tensor.zero_()
        return True
