"""The objective: relative L0 plus the sub-threshold mass (M7)."""

from __future__ import annotations

from torch import Tensor


def sparsity_objective(
    l0: Tensor,
    subthreshold: Tensor,
    *,
    l0_ref: float | Tensor,
    lambda_disc: float | Tensor,
    d_model: int,
) -> Tensor:
    """ℓ0 = E Σ_j gate_j / L0_ref + λ_disc·E Σ_j relu(pre_j)²·(1 − gate_j) / d (M7).

    Args:
        l0: active features of each token, ``[tokens]``.
        subthreshold: sub-threshold mass of each token, ``[tokens]``.
        l0_ref: reference L0 of this step.
        lambda_disc: weight of the second term; a plain 0 leaves it out of the graph.
        d_model: width d of the activations.

    Returns:
        A scalar, about 1 when L0 is at its reference.
    """
    objective = l0.mean() / l0_ref
    if isinstance(lambda_disc, float | int) and lambda_disc == 0:
        return objective
    return objective + lambda_disc * subthreshold.mean() / d_model
