"""Keeps a run's state finite, and finds out afterwards what was not, without slowing the run.

The first step whose loss or gradient is not finite changes nothing, nor does any step after it,
until somebody looks. That is decided on the device, so no step waits for the host; the host looks
where it reads the device anyway, and then rewinds the little that it keeps itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spalf.controller import ControllerState

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
        self._before: dict[int, tuple[ControllerState, Tensor]] = {}

    @property
    def found(self) -> Tensor:
        """1 from the first bad step on, else 0; float32 scalar on the device."""
        return self._found

    def remember(self, state: TrainState) -> None:
        """Keep references to what `rewind` has to put back; nothing is copied."""
        self._before[state.step] = (state.controller, state.stale)

    def observe(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Take in the scalars of one step, before its update."""
        self._poison.add_(loss.detach() + gradient_norm, alpha=0.0)
        self._found = self._poison.isnan().to(self._found.dtype)
        self._stalled.add_(self._found)

    def stalled(self) -> int:
        """Steps from the first bad one on, 0 if there was none; waits for the device."""
        return int(self._stalled.item())

    def update(self, optimizer: torch.optim.Adam) -> None:
        """Step the optimiser unless the run is frozen."""
        if optimizer.defaults["fused"]:
            # Read by the fused kernel itself, as a gradient scaler would set it.
            optimizer.found_inf = self._found  # type: ignore[attr-defined]
            optimizer.step()
        elif not self._found.item():
            optimizer.step()

    def rewind(self, state: TrainState) -> bool:
        """Put ``state`` back to before the first bad step since the last call, if there was one.

        Returns:
            Whether there was.
        """
        stalled, before = self.stalled(), self._before
        self._before = {}
        if not stalled:
            return False
        state.step -= stalled
        state.controller, state.stale = before[state.step]
        for tensor in (self._poison, self._found, self._stalled):
            tensor.zero_()
        return True
