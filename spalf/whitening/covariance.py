"""Streaming mean and covariance with a gate that measures its own sampling error (M1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a stream of activations.

    Attributes:
        count: activations seen.
        mean: float64 ``[d_model]``.
        covariance: float64 ``[d_model, d_model]``, the population form (divided by ``count``).
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> float:
        """Total variance E‖x − E x‖², the trace of the covariance."""
        return float(self.covariance.trace())


class RunningCovariance:
    """Mean and scatter matrix by Chan's batch update, in float64; mergeable in any order (M1).

    Args:
        d_model: width of the activations.
        device: where the accumulators live; give that of the activations.
    """

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(d_model, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add activations ``x [tokens, d_model]`` of any floating dtype; an empty batch is nothing.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if x.ndim != 2 or x.shape[1] != self.mean.shape[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}, not [tokens, {self.mean.shape[0]}]")
        if x.shape[0] == 0:
            return
        wide = x.to(device=self.mean.device, dtype=torch.float64)
        mean = wide.mean(dim=0)
        centred = wide - mean
        self._combine(x.shape[0], mean, centred.T @ centred)

    def merge(self, other: RunningCovariance) -> None:
        """Add everything ``other`` has seen; ``other`` is left as it was."""
        if other.count:
            device = self.mean.device
            self._combine(other.count, other.mean.to(device), other.scatter.to(device))

    def moments(self) -> Moments:
        """The moments so far.

        Raises:
            ValueError: nothing has been seen.
        """
        if not self.count:
            raise ValueError("no activations seen, so there are no moments")
        return Moments(self.count, self.mean.clone(), self.scatter / self.count)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the accumulators: ``count``, ``mean``, ``scatter``."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over accumulators saved by `state_dict`; continuing is then bit-identical."""
        if state["mean"].shape != self.mean.shape:
            raise ValueError(f"state is for d_model = {state['mean'].shape[0]}")
        self.count = int(state["count"])
        self.mean = state["mean"].to(self.mean.device, copy=True)
        self.scatter = state["scatter"].to(self.scatter.device, copy=True)

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


class SplitHalfCovariance:
    """Covariance of a stream kept as two interleaved halves, whose difference is the gate of M1.

    Whole updates go to the halves in turn. Interleaving finer than that (by token or by sequence)
    would put the two parts of one document in different halves, make the halves depend on each
    other, and understate the error; coarser would let a drift of the stream look like one.

    Args:
        d_model: width of the activations.
        device: where the accumulators live; give that of the activations.
    """

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self._halves = (RunningCovariance(d_model, device), RunningCovariance(d_model, device))
        self._updates = 0

    @property
    def count(self) -> int:
        """Activations seen by both halves."""
        return self._halves[0].count + self._halves[1].count

    def update(self, x: Tensor) -> None:
        """Add one batch ``x [tokens, d_model]`` to the half whose turn it is."""
        self._halves[self._updates % 2].update(x)
        self._updates += 1

    def error(self) -> float:
        """‖Σ_a − Σ_b‖_F/‖Σ‖_F; infinite until both halves have data, 0 if nothing varies.

        For halves of equal size this is about twice the relative standard error of Σ itself.
        """
        a, b = self._halves
        if not (a.count and b.count):
            return math.inf
        difference = torch.linalg.matrix_norm(a.scatter / a.count - b.scatter / b.count)
        size = torch.linalg.matrix_norm(self.merged().covariance)
        return float(difference / size) if size > 0 else 0.0

    def converged(self, delta_cov: float) -> bool:
        """Whether `error` is at most ``delta_cov``, so that calibration may stop."""
        return self.error() <= delta_cov

    def merged(self) -> Moments:
        """Moments of both halves together.

        Raises:
            ValueError: nothing has been seen.
        """
        first = self._halves[0]
        both = RunningCovariance(first.mean.shape[0], first.mean.device)
        for half in self._halves:
            both.merge(half)
        return both.moments()

    def state_dict(self) -> dict[str, Tensor]:
        """Both halves and whose turn it is, as tensors only."""
        state = {"updates": torch.tensor(self._updates, dtype=torch.int64)}
        for name, half in zip("ab", self._halves, strict=True):
            state |= {f"{name}.{key}": value for key, value in half.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state saved by `state_dict`; continuing is then bit-identical."""
        for name, half in zip("ab", self._halves, strict=True):
            half.load_state_dict({k: state[f"{name}.{k}"] for k in ("count", "mean", "scatter")})
        self._updates = int(state["updates"])
