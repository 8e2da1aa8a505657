"""The SAE on lists of entries in plain PyTorch: what the Triton kernels do, for a CPU (M4, M6, M7).

Only the encoder's product is dense. What follows touches the entries whose gate is open or which
lie in the surrogate's window: decoding sums rows of the decoder over each token's entries, the
gradients of the weights sum over each feature's. Both are `embedding_bag`, whose sums have a fixed
order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from spalf.kernels.reference import Surrogate, surrogate_scale


class Entries(NamedTuple):
    """The entries of a batch that matter, token by token.

    Attributes:
        token: int64 ``[n]``, ascending.
        feature: int64 ``[n]``, ascending within a token.
        value: pre-activations, ``[n]``.
        start: index of each token's first entry, int64 ``[tokens]``.
    """

    token: Tensor
    feature: Tensor
    value: Tensor
    start: Tensor


def list_entries(pre: Tensor, lower: Tensor) -> Entries:
    """The entries of ``pre [tokens, d_sae]`` above ``lower [d_sae]``, and those that are NaN."""
    tokens, d_sae = pre.shape
    places = (pre <= lower).logical_not_().view(-1).nonzero().squeeze(1)
    token, feature = places // d_sae, places % d_sae
    return Entries(token, feature, pre.view(-1)[places], _starts(token, tokens))


def _starts(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count, device=ascending.device))


class TorchListAutoencode(torch.autograd.Function):
    """(x̂, l0, sub, fired, pre) of a batch; see `spalf.kernels.autoencode.Autoencoded`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        bandwidth: Tensor,
        surrogate: Surrogate,
        sub_rows: int,
        centred: bool,
    ) -> tuple[Tensor, ...]:
        """One dense product, one look at its result, one walk over each token's entries."""
        pre = torch.addmm(b_enc, x, W_enc.T)
        lower = threshold if surrogate == "moreau" else threshold - 0.5 * bandwidth
        entries = list_entries(pre, lower)
        gate = (entries.value > threshold[entries.feature]).float()
        # A product, not a choice: a NaN then goes on instead of being gated away.
        code = entries.value * gate
        x_hat = _sum_rows(W_dec, entries.feature, entries.start, code).add_(b_dec)
        l0 = torch.zeros(len(x), device=x.device).index_add_(0, entries.token, gate)
        fired = torch.zeros(len(W_dec), device=x.device).index_add_(0, entries.feature, gate) > 0
        below = pre[:sub_rows] * (pre[:sub_rows] <= threshold)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fired, pre)
        ctx.save_for_backward(x, W_enc, threshold, W_dec, bandwidth, pre, *entries, gate, code)
        ctx.surrogate, ctx.centred = surrogate, centred
        return x_hat, l0, below.relu_().square_().sum(dim=1), fired, pre

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dx_hat: Tensor | None, dl0: Tensor | None, dsub: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        """All gradients in one walk over each feature's entries."""
        x, W_enc, threshold, W_dec, bandwidth, pre, *saved, gate, code = ctx.saved_tensors
        entries = Entries(*saved)
        dz = None if dx_hat is None else _dots(entries, W_dec, dx_hat)
        order = entries.feature.argsort(stable=True)
        start = _starts(entries.feature[order], len(W_dec))
        token = entries.token[order]
        d_pre = torch.zeros_like(code) if dz is None else dz * gate
        d_W_enc = _sum_rows(x, token, start, d_pre[order])
        d_b_enc = torch.zeros_like(threshold).index_add_(0, entries.feature, d_pre)
        d_W_dec = d_b_dec = None
        if dx_hat is not None:
            d_b_dec = dx_hat.sum(dim=0)
            seen = dx_hat - d_b_dec / len(x) if ctx.centred else dx_hat
            d_W_dec = _sum_rows(seen, token, start, code[order])
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _sum_rows(W_enc, entries.feature, entries.start, d_pre)
        if dsub is not None:
            rows = len(dsub)
            d_below = (pre[:rows].relu() * (pre[:rows] <= threshold)).mul_(2 * dsub.unsqueeze(1))
            d_W_enc.addmm_(d_below.T, x[:rows])
            d_b_enc += d_below.sum(dim=0)
            if d_x is not None:
                d_x[:rows].addmm_(d_below, W_enc)
        d_threshold = _threshold_gradient(
            entries, threshold, bandwidth, ctx.surrogate, dz, dl0, dsub
        )
        return d_x, d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec, None, None, None, None


def _sum_rows(table: Tensor, rows: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows of ``table``, one for each stretch of ``rows`` from ``start`` on."""
    return embedding_bag(rows, table, start, mode="sum", per_sample_weights=weight)


def _dots(entries: Entries, W_dec: Tensor, dx_hat: Tensor) -> Tensor:
    """⟨∂L/∂x̂, decoder column⟩ of each entry, ``[n]``: what `embedding_bag` gives its weights."""
    with torch.enable_grad():
        weight = torch.zeros_like(entries.value).requires_grad_()
        summed = _sum_rows(W_dec.detach(), entries.feature, entries.start, weight)
        (dots,) = torch.autograd.grad(summed, weight, dx_hat)
    return dots


def _threshold_gradient(
    entries: Entries,
    threshold: Tensor,
    bandwidth: Tensor,
    surrogate: Surrogate,
    dz: Tensor | None,
    dl0: Tensor | None,
    dsub: Tensor | None,
) -> Tensor:
    """−Σ (∂L/∂z·θ + ∂L/∂gate)·w over the entries of each feature (M6), ``[d_sae]``."""
    theta, epsilon = threshold[entries.feature], bandwidth[entries.feature]
    u = entries.value - theta
    if surrogate == "rectangle":
        window = (u.abs() < epsilon / 2).float()
    else:
        window = u * ((u > 0) & (u < epsilon))
    d_gate = torch.zeros_like(u) if dz is None else dz * theta
    if dl0 is not None:
        d_gate = d_gate + dl0[entries.token]
    if dsub is not None:
        counted = entries.token < len(dsub)
        d_gate[counted] -= dsub[entries.token[counted]] * theta[counted].square()
    total = torch.zeros_like(threshold).index_add_(0, entries.feature, d_gate * window)
    return total.mul_(surrogate_scale(bandwidth, surrogate)).neg_()
