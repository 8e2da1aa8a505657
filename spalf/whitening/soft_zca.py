"""Soft-ZCA whitening: a symmetric linear map with a bounded gain (M2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spalf.errors import UserError
from spalf.whitening.covariance import Moments

MAX_FULL_RANK = 4096
"""Above this width only the leading eigenvectors are kept (M2)."""


@dataclass(frozen=True, eq=False)
class SoftZCA:
    """W = U(Λ + αI)^(−1/2)Uᵀ about a mean, at full rank or with an isotropic complement (M2).

    With U square the hot path is one product with a ready-made W; with fewer columns the
    directions orthogonal to U share one eigenvalue, and memory stays O(d_model·k). The factors
    are float64; whitening itself runs in float32.

    Attributes:
        mean: float64 ``[d_model]``.
        U: float64 ``[d_model, k]``, orthonormal columns, by falling eigenvalue.
        eigenvalues: float64 ``[k]``, ≥ 0.
        complement: float64 scalar, the eigenvalue outside the span of U; unused where U is square.
        alpha: ridge added to every eigenvalue.
        rank: smallest number of eigenvectors that hold 1 − delta_rank of the trace.
    """

    mean: Tensor
    U: Tensor
    eigenvalues: Tensor
    complement: Tensor
    alpha: float
    rank: int
    _mean: Tensor = field(init=False, repr=False)
    _U: Tensor = field(init=False, repr=False)
    _gains: Tensor = field(init=False, repr=False)
    _base: float = field(init=False, repr=False)
    _W: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gains, base = self._scales(-0.5)
        is_square = self.U.shape[0] == self.U.shape[1]
        dense = (self.U * gains) @ self.U.T if is_square else None
        working = {
            "_mean": self.mean.float(),
            # The dense map replaces the float32 factors; keeping both would waste d² numbers.
            "_U": self.U[:, :0].float() if is_square else self.U.float(),
            "_gains": gains.float(),
            "_base": base,
            "_W": None if dense is None else ((dense + dense.T) / 2).float(),
        }
        for name, value in working.items():
            object.__setattr__(self, name, value)

    @classmethod
    def fit(
        cls,
        moments: Moments,
        kappa: float,
        delta_rank: float,
        max_full_rank: int = MAX_FULL_RANK,
    ) -> SoftZCA:
        """The whitener of the given moments: α = λ_k/κ, k from ``delta_rank`` (M2).

        Raises:
            UserError: the activations are not finite, or do not vary.
        """
        _check_spread(moments)
        eigenvalues, vectors = torch.linalg.eigh(moments.covariance)
        # Rounding leaves the null space of Σ slightly negative.
        eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0.0), vectors.flip(1)
        held = eigenvalues.cumsum(0)
        rank = int((held < (1 - delta_rank) * held[-1]).sum()) + 1
        d_model = eigenvalues.shape[0]
        kept = d_model if d_model <= max_full_rank else rank
        rest = eigenvalues[kept:]
        return cls(
            mean=moments.mean.clone(),
            U=vectors[:, :kept].contiguous(),
            eigenvalues=eigenvalues[:kept].clone(),
            complement=rest.mean() if kept < d_model else eigenvalues.new_zeros(()),
            alpha=float(eigenvalues[rank - 1]) / kappa,
            rank=rank,
        )

    @classmethod
    def identity(cls, mean: Tensor) -> SoftZCA:
        """Centring only, W = I: the ablation without whitening. ``mean`` is ``[d_model]``."""
        wide = mean.detach().to(torch.float64).clone()
        empty = wide.new_zeros
        return cls(wide, empty(wide.shape[0], 0), empty(0), wide.new_ones(()), alpha=0.0, rank=0)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.mean.shape[0]

    @property
    def is_full_rank(self) -> bool:
        """Whether every eigenvector is kept, so that W is one dense matrix."""
        return self._W is not None

    def whiten(self, x: Tensor) -> Tensor:
        """x̃ = W(x − μ) for ``x [..., d_model]``; float32 of the same shape."""
        return self.apply(x.float() - self._mean)

    def apply(self, v: Tensor) -> Tensor:
        """W v without centring, for ``v [..., d_model]``; float32 of the same shape."""
        v = v.float()
        if self._W is not None:
            return v @ self._W
        return _factored(v, self._U, self._gains, self._base)

    def apply_inverse(self, v: Tensor) -> Tensor:
        """W⁻¹ v for ``v [..., d_model]``; float32, computed in float64 from the same factors."""
        gains, base = self._scales(0.5)
        return _factored(v.to(torch.float64), self.U, gains, base).float()

    def mahalanobis(self, r: Tensor) -> Tensor:
        """‖W r‖² for residuals ``r [..., d_model]``; float32 ``[...]`` (M8)."""
        return self.apply(r).square().sum(dim=-1)

    def to(self, device: torch.device | str) -> SoftZCA:
        """The same whitener with its tensors on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return SoftZCA.from_tensors(moved)

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to rebuild it with `from_tensors`, by name."""
        return {
            "mean": self.mean,
            "U": self.U,
            "eigenvalues": self.eigenvalues,
            "complement": self.complement,
            "alpha": torch.tensor(self.alpha, dtype=torch.float64),
            "rank": torch.tensor(self.rank, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SoftZCA:
        """The whitener that `tensors` described; other names in the mapping are ignored.

        Raises:
            KeyError: one of the tensors is missing.
        """
        factors = {name: tensors[name] for name in ("mean", "U", "eigenvalues", "complement")}
        return cls(**factors, alpha=float(tensors["alpha"]), rank=int(tensors["rank"]))

    def _scales(self, power: float) -> tuple[Tensor, float]:
        """(λ + α)^power of the kept directions ``[k]``, and of the complement."""
        base = (float(self.complement) + self.alpha) ** power if self._has_complement else 0.0
        return (self.eigenvalues + self.alpha).pow(power), base

    @property
    def _has_complement(self) -> bool:
        return self.U.shape[1] < self.U.shape[0]


def _factored(v: Tensor, vectors: Tensor, gains: Tensor, base: float) -> Tensor:
    """``v [..., d]`` scaled by ``gains`` along the columns of ``vectors``, else by ``base``."""
    if vectors.shape[1] == 0:
        return v * base
    return v * base + ((v @ vectors) * (gains - base)) @ vectors.T


def _check_spread(moments: Moments) -> None:
    if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
        remedy = "the activations there overflow or are not numbers; use dtype float32"
        raise UserError("hook_point", None, remedy)
    # Below the resolution of float32 activations, what varies is rounding.
    resolution = torch.finfo(torch.float32).eps ** 2 * float(moments.mean.square().sum())
    if moments.variance <= resolution:
        remedy = (
            f"its activations are constant over {moments.count} calibration tokens of the "
            "dataset; choose a later site, or a dataset with more varied text"
        )
        raise UserError("hook_point", None, remedy)
