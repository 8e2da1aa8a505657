"""The SAE itself: whitening, a JumpReLU encoder, and a decoder in two strata (M4, M6)."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from spalf.kernels import (
    Autoencoded,
    Choice,
    Implementation,
    Meanwhile,
    Parameters,
    Plan,
    Precision,
    Surrogate,
    autoencode,
    choose_lists,
    list_capacity,
)
from spalf.whitening import SoftZCA

logger = logging.getLogger(__name__)

WAYS = {
    "triton": "lists of active entries in Triton",
    "torch": "lists of active entries in PyTorch",
    "reference": "dense products",
}


@dataclass(frozen=True)
class SAEOutput:
    """One forward pass over ``tokens`` activations, in the SAE's own units (see `StratifiedSAE`).

    Attributes:
        x: the activations, ``[tokens, d_model]``.
        encoded: what the kernels found; its reconstruction is that of x/scale.
        scale: of the SAE.
    """

    x: Tensor
    encoded: Autoencoded
    scale: float

    @property
    def residual(self) -> Tensor:
        """(x − x̂)/scale, ``[tokens, d_model]``."""
        return self.x / self.scale - self.encoded.x_hat

    @property
    def x_hat(self) -> Tensor:
        """Reconstruction in the units of the input, ``[tokens, d_model]``."""
        return self.encoded.x_hat * self.scale

    @property
    def l0(self) -> Tensor:
        """Active features of each token, ``[tokens]``."""
        return self.encoded.l0

    @property
    def subthreshold(self) -> Tensor:
        """Σ_j relu(pre_j)²·(1 − gate_j) of the first tokens, ``[sub_rows]`` (M7)."""
        return self.encoded.subthreshold


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
        centred: whether W_dec's gradient is that for codes less their mean over the batch (M4).
        list_margin: how much more room than usual lists of active entries need; changes no result.
    """

    bandwidth: Tensor
    anchors: Tensor
    metric_factor: Tensor | None

    def __init__(
        self,
        whitener: SoftZCA,
        d_sae: int,
        anchors: Tensor,
        scale: float,
        surrogate: Surrogate = "rectangle",
        kernel: Implementation = "auto",
        precision: Precision = "float32",
        metric_factor: Tensor | None = None,
    ) -> None:
        """Allocate an untrained SAE; `spalf.sae.initialise` gives it useful weights.

        Args:
            whitener: soft-ZCA transform of the site's activations.
            d_sae: dictionary size F.
            anchors: token directions W_A⁰ of the anchored stratum, ``[n_anchored, d_model]``.
            scale: √(tr Σ / d_model).
            surrogate: ``rectangle`` or ``moreau``.
            kernel: ``auto``, ``triton`` or ``reference``.
            precision: of the operands of matrix products in training.
            metric_factor: of the metric that training errors are measured in,
                ``[d_model, d_model]``; ``None`` where it needs none.
        """
        super().__init__()
        d_model = whitener.mean.shape[0]
        device = whitener.mean.device
        self.whitener, self.scale = whitener, scale
        self.surrogate, self.kernel, self.precision = surrogate, kernel, precision
        self.centred = False
        self.list_margin = 1.0
        self._copies: dict[Tensor, tuple[Tensor, int]] = {}
        self._said: set[str] = set()
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_model, device=device))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.log_threshold = nn.Parameter(torch.zeros(d_sae, device=device))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_model, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_model, device=device))
        self.register_buffer("bandwidth", torch.ones(d_sae, device=device))
        self.register_buffer("anchors", anchors.to(device, torch.float32), persistent=False)
        self.register_buffer("metric_factor", metric_factor, persistent=False)

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

    def forward(
        self,
        x: Tensor,
        expected_l0: float | None = None,
        sub_rows: int | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> SAEOutput:
        """Encode and decode activations, with surrogate gradients.

        Args:
            x: ``[tokens, d_model]``.
            expected_l0: active features per token to be expected; where they are few, lists of
                them replace dense products. ``None`` computes densely.
            sub_rows: tokens, the first ones, whose sub-threshold mass is wanted; ``None`` for all.
            meanwhile: called with the pre-activations as soon as they are there; what it starts on
                another stream runs beside the rest.
        """
        tokens = x.shape[0]
        lists, capacity = self._lists_for(tokens, expected_l0)
        operands = self._operands() if lists == "triton" else None
        parameters = Parameters(
            self.W_enc, self.b_enc, self.threshold, self.W_dec, self.b_dec, self.bandwidth, operands
        )
        rows = tokens if sub_rows is None else min(sub_rows, tokens)
        plan = Plan(
            self.surrogate, self.precision, self.kernel, rows, lists, capacity, self.centred
        )
        encoded = autoencode(self.whitener.whiten(x), parameters, plan, meanwhile)
        return SAEOutput(x, encoded, self.scale)

    def _operands(self) -> tuple[Tensor, Tensor] | None:
        """Encoder and decoder in bfloat16, made anew where something but `adam` changed them."""
        if self.precision == "float32":
            return None
        copies = []
        for weight in (self.W_enc, self.W_dec):
            copy, version = self._copies.get(weight, (None, -1))
            if copy is None:
                copy = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
            if version != weight._version:
                copy.copy_(weight.detach())
            self._copies[weight] = copy, weight._version
            copies.append(copy)
        return copies[0], copies[1]

    def operand_of(self, parameter: Tensor) -> Tensor | None:
        """The bfloat16 copy of a parameter, which whoever changes it unseen must change as well."""
        return self._copies[parameter][0] if parameter in self._copies else None

    def capacity_for(self, tokens: int, expected_l0: float) -> int | None:
        """Room that lists of active entries have in Triton; ``None`` where others serve."""
        lists, capacity = self._lists_for(tokens, expected_l0)
        return capacity if lists == "triton" else None

    def _lists_for(
        self, tokens: int, expected_l0: float | None
    ) -> tuple[Literal["triton", "torch"] | None, int]:
        """Which lists of active entries serve a batch, and the room they have."""
        if expected_l0 is None:
            return None, 0
        choice = choose_lists(self.W_dec, self.d_sae, expected_l0, self.kernel)
        if choice.implementation == "torch" and self.precision != "float32":
            choice = Choice("reference", "lists on a CPU are for float32")
        self._say(choice)
        if choice.implementation == "reference":
            return None, 0
        capacity = list_capacity(tokens, self.d_sae, expected_l0, self.list_margin)
        return choice.implementation, capacity

    def fit_lists(self, encoded: Autoencoded) -> None:
        """Take back room for entries that was needed once and no longer is; waits for the device.

        What is left is at least twice what the pass took.
        """
        if self.list_margin == 1 or encoded.listed is None:
            return
        listed, capacity = int(encoded.listed), encoded.capacity
        # All at once: each change of size has a step recorded anew.
        while self.list_margin > 1 and 4 * listed <= capacity:
            self.list_margin, capacity = self.list_margin / 2, capacity // 2

    def _say(self, choice: Choice) -> None:
        """Log how codes are computed, once for each way."""
        if choice.implementation not in self._said:
            self._said.add(choice.implementation)
            logger.info("codes by %s: %s", WAYS[choice.implementation], choice.reason)

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
    first, third = (max(1, round(share * tokens)) for share in (0.25, 0.75))
    if pre.is_cuda:  # where sorting rows takes a quarter of the time
        ascending = pre.T.contiguous().sort(dim=1).values
        lower, upper = ascending[:, first - 1], ascending[:, third - 1]
    else:
        lower, upper = (pre.kthvalue(k, dim=0).values for k in (first, third))
    return (upper - lower).float().clamp_min(1e-6)
