"""Initialisation (M3, M5): anchors, free directions, matched filters, thresholds and one scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spalf.config import MethodConfig
from spalf.errors import UserError
from spalf.sae.stratified import StratifiedSAE, interquartile_range
from spalf.whitening import SoftZCA


@dataclass(frozen=True)
class InitReport:
    """What initialisation found, stored with the run.

    Attributes:
        v_cap: anchored columns.
        theta_quantile: quantile of each pre-activation at which its threshold starts.
        init_scale: the least-squares scalar put on encoder and thresholds.
        bandwidth_median: median of ε_j.
        first_mse: E‖x − x̂‖²/scale² on the calibration sample.
        first_explained_variance: R² there; I2 says it is positive.
    """

    v_cap: int
    theta_quantile: float
    init_scale: float
    bandwidth_median: float
    first_mse: float
    first_explained_variance: float


def anchor_directions(unembedding: Tensor, d_sae: int, method: MethodConfig) -> Tensor:
    """W_A⁰: the first V_cap token directions, centred and unit-normalised (M3).

    Args:
        unembedding: centred unembedding columns as rows, most frequent token first,
            ``[tokens, d_model]``.
        d_sae: dictionary size F.
        method: ``anchors`` switches the stratum off, ``v_cap`` overrides min(V, F/16).

    Returns:
        ``[V_cap, d_model]``, rows of unit norm.

    Raises:
        UserError: more anchors were asked for than there are tokens or features.
    """
    available = unembedding.shape[0]
    wanted = min(available, d_sae // 16) if method.v_cap is None else method.v_cap
    if wanted >= d_sae or wanted > available:
        limit = min(available, d_sae - 1)
        raise UserError("method.v_cap", wanted, f"must be at most {limit} here")
    rows = unembedding[: wanted if method.anchors else 0]
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)


def free_directions(anchors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit directions for stratum B: Gram–Schmidt against anchors and each other, then random.

    Only d − rank(anchors) directions can be orthogonal to the anchors and to one another; those
    come first, the rest are isotropic.

    Args:
        anchors: ``[n_anchored, d_model]``.
        count: number of directions.
        generator: CPU generator, so that the result does not depend on the device.

    Returns:
        ``[count, d_model]``, on the CPU.
    """
    d_model = anchors.shape[1]
    random = torch.randn(count, d_model, generator=generator)
    remaining = d_model - anchors.shape[0]
    if remaining > 0:
        leading = min(count, remaining)
        stacked = torch.cat([anchors.cpu().float(), random[:leading]]).T
        basis, _ = torch.linalg.qr(stacked.double())
        random[:leading] = basis.T[anchors.shape[0] :].float()
    return random / torch.linalg.vector_norm(random, dim=1, keepdim=True)


def encoder_rows(whitener: SoftZCA, directions: Tensor, kind: str) -> Tensor:
    """Encoder rows with unit response to their own direction (M5).

    The matched filter W·ŵ is the best linear detector of ŵ in noise of covariance Σ; the ablation
    ``inverse_whitening`` uses W⁻¹·ŵ, which reads the raw projection ⟨ŵ, x − μ⟩.

    Args:
        whitener: soft-ZCA transform.
        directions: unit rows, ``[d_sae, d_model]``.
        kind: ``matched_filter`` or ``inverse_whitening``.

    Returns:
        ``[d_sae, d_model]``, acting on whitened input.
    """
    seen = whitener.apply(directions)
    if kind == "inverse_whitening":
        return whitener.apply_inverse(directions)
    return seen / seen.square().sum(dim=1, keepdim=True).clamp_min(1e-20)


@torch.no_grad()
def initialise(
    sae: StratifiedSAE,
    sample: Tensor,
    *,
    l0_start: float,
    c_eps: float,
    encoder_init: str,
    seed: int,
) -> InitReport:
    """Give an allocated SAE its starting weights, in place (M5, I2).

    Args:
        sae: as constructed, with its anchors.
        sample: activations from the calibration split, ``[tokens, d_model]``.
        l0_start: L0 at which training starts, m·L0_target.
        c_eps: bandwidth in interquartile ranges.
        encoder_init: see `encoder_rows`.
        seed: chooses the free directions.

    Returns:
        The fitted scalars, and the R² they give.
    """
    generator = torch.Generator().manual_seed(seed)
    free = free_directions(sae.anchors, sae.d_sae - sae.n_anchored, generator)
    sae.W_dec.copy_(torch.cat([sae.anchors, free.to(sae.anchors)]))
    sae.W_enc.copy_(encoder_rows(sae.whitener, sae.W_dec, encoder_init))
    sae.b_dec.copy_(sae.whitener.mean / sae.scale)
    quantile = 1 - l0_start / sae.d_sae
    pre = sae.pre_activations(sample)
    threshold, bandwidth = _thresholds(pre, quantile), c_eps * interquartile_range(pre)
    target = sample / sae.scale - sae.b_dec
    first = (pre * (pre > threshold)) @ sae.W_dec
    scalar = float((target * first).sum() / first.square().sum().clamp_min(1e-20))
    sae.W_enc.mul_(scalar)
    sae.log_threshold.copy_((threshold * scalar).log())
    sae.bandwidth.copy_(bandwidth * scalar)
    mse = float((target - scalar * first).square().sum(dim=1).mean())
    variance = float((target - target.mean(dim=0)).square().sum(dim=1).mean())
    return InitReport(
        v_cap=sae.n_anchored,
        theta_quantile=quantile,
        init_scale=scalar,
        bandwidth_median=float(sae.bandwidth.median()),
        first_mse=mse,
        first_explained_variance=1 - mse / variance,
    )


def _thresholds(pre: Tensor, quantile: float) -> Tensor:
    """The given quantile of each column, kept positive because θ = exp(log θ)."""
    rank = min(pre.shape[0], max(1, round(quantile * pre.shape[0])))
    value = pre.kthvalue(rank, dim=0).values
    return torch.maximum(value, 0.05 * pre.std(dim=0))
