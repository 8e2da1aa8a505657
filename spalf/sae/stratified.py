"""The SAE itself: whitening, a JumpReLU encoder, and a decoder in two strata (M4, M6)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spalf.kernels import Implementation, Surrogate, jumprelu
from spalf.whitening import SoftZCA


class SAEOutput(NamedTuple):
    """One forward pass over ``tokens`` activations, in the SAE's own units (see `StratifiedSAE`).

    Attributes:
        residual: (x − x̂)/scale, ``[tokens, d_model]``.
        x_hat: reconstruction in the units of the input, ``[tokens, d_model]``.
        z: codes, ``[tokens, d_sae]``.
        pre: pre-activations, ``[tokens, d_sae]``.
        l0: active features of each token, ``[tokens]``.
        subthreshold: Σ_j relu(pre_j)²·(1 − gate_j) of each token, ``[tokens]`` (M7).
    """

    residual: Tensor
    x_hat: Tensor
    z: Tensor
    pre: Tensor
    l0: Tensor
    subthreshold: Tensor


class StratifiedSAE(nn.Module):
    """JumpReLU SAE on whitened input whose first decoder columns are tied to the unembedding.

    M4: pre = W_enc·W(x − μ) + b_enc, z = pre ⊙ 1[pre > θ], x̂ = scale·(z·W_dec + b_dec).

    ``scale`` = √(tr Σ / d) is a constant of the data. It makes codes, thresholds and learning
    rates independent of how large a model's activations happen to be: ``z`` is in units of it.

    Attributes:
        W_enc: encoder rows, ``[d_sae, d_model]``.
        b_enc: ``[d_sae]``.
        log_threshold: log θ, ``[d_sae]``, float32 whatever the compute dtype.
        W_dec: row j is the decoder column of feature j, ``[d_sae, d_model]``; the first
            ``n_anchored`` rows are stratum A, the rest (unit norm) stratum B.
        b_dec: ``[d_model]``, in units of ``scale``.
        bandwidth: ε_j of the surrogate, ``[d_sae]`` (M6); no gradient.
    """

    bandwidth: Tensor
    anchors: Tensor

    def __init__(
        self,
        whitener: SoftZCA,
        d_sae: int,
        anchors: Tensor,
        scale: float,
        surrogate: Surrogate = "rectangle",
        kernel: Implementation = "auto",
    ) -> None:
        """Allocate an untrained SAE; `spalf.sae.initialise` gives it useful weights.

        Args:
            whitener: soft-ZCA transform of the site's activations.
            d_sae: dictionary size F.
            anchors: token directions W_A⁰ of the anchored stratum, ``[n_anchored, d_model]``.
            scale: √(tr Σ / d_model).
            surrogate: ``rectangle`` or ``moreau``.
            kernel: ``auto``, ``triton`` or ``reference``.
        """
        super().__init__()
        d_model = whitener.mean.shape[0]
        device = whitener.mean.device
        self.whitener, self.scale = whitener, scale
        self.surrogate, self.kernel = surrogate, kernel
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_model, device=device))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.log_threshold = nn.Parameter(torch.zeros(d_sae, device=device))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_model, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_model, device=device))
        self.register_buffer("bandwidth", torch.ones(d_sae, device=device))
        self.register_buffer("anchors", anchors.to(device, torch.float32), persistent=False)

    @property
    def d_sae(self) -> int:
        """Dictionary size F."""
        return self.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.W_dec.shape[1]

    @property
    def n_anchored(self) -> int:
        """Number of decoder columns in the anchored stratum."""
        return self.anchors.shape[0]

    @property
    def threshold(self) -> Tensor:
        """θ, ``[d_sae]``."""
        return self.log_threshold.exp()

    def pre_activations(self, x: Tensor) -> Tensor:
        """``[tokens, d_model]`` → ``[tokens, d_sae]``."""
        return functional.linear(self.whitener.whiten(x), self.W_enc, self.b_enc)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode activations ``[tokens, d_model]``, with surrogate gradients."""
        pre = self.pre_activations(x)
        z, l0, subthreshold = jumprelu(
            pre, self.threshold, self.bandwidth, self.surrogate, implementation=self.kernel
        )
        scaled = torch.addmm(self.b_dec, z, self.W_dec)
        return SAEOutput(x / self.scale - scaled, scaled * self.scale, z, pre, l0, subthreshold)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of activations: ``[..., d_model]`` → ``[..., d_sae]``, in units of ``scale``."""
        pre = self.pre_activations(x)
        return pre * (pre > self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        """Activations from codes: ``[..., d_sae]`` → ``[..., d_model]``."""
        return (z @ self.W_dec + self.b_dec) * self.scale

    def scaled_thresholds(self, factor: float) -> StratifiedSAE:
        """A view on the same weights with every θ multiplied by ``factor``."""
        view = copy.copy(self)
        view._parameters = dict(self._parameters)
        shifted = self.log_threshold.detach() + torch.tensor(factor).log().item()
        view._parameters["log_threshold"] = nn.Parameter(shifted, requires_grad=False)
        return view

    @torch.no_grad()
    def refresh_bandwidth(self, pre: Tensor, c_eps: float) -> None:
        """ε_j = c_ε·IQR_j over a sample of pre-activations ``[tokens, d_sae]`` (M6)."""
        self.bandwidth.copy_(c_eps * interquartile_range(pre))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the free columns' gradient its part along the column (M4)."""
        if self.W_dec.grad is None:
            return
        free, grad = self.W_dec[self.n_anchored :], self.W_dec.grad[self.n_anchored :]
        grad.sub_((grad * free).sum(dim=1, keepdim=True) * free)

    @torch.no_grad()
    def normalise_free_columns(self, unless: Tensor | None = None) -> None:
        """Put the free columns back on the unit sphere (M4).

        Args:
            unless: scalar on the device; where it is not 0 the columns stay bit for bit as they
                are.
        """
        free = self.W_dec[self.n_anchored :]
        norm = torch.linalg.vector_norm(free, dim=1, keepdim=True).clamp_min_(1e-12)
        free.div_(norm if unless is None else torch.where(unless != 0, 1.0, norm))


def interquartile_range(pre: Tensor) -> Tensor:
    """Interquartile range of each column of ``pre [tokens, d_sae]``, by order statistics."""
    tokens = pre.shape[0]
    # Two order statistics rather than torch.quantile, which refuses more than 2²⁴ elements.
    lower = pre.kthvalue(max(1, round(0.25 * tokens)), dim=0).values
    upper = pre.kthvalue(max(1, round(0.75 * tokens)), dim=0).values
    return (upper - lower).float().clamp_min(1e-6)
