"""One forward pass of the SAE, dense or on lists of active entries (M4, M6, M7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spalf.kernels.dispatch import Choice, Implementation, choose, jumprelu
from spalf.kernels.reference import Surrogate
from spalf.kernels.torch_lists import TorchListAutoencode
from spalf.recording import Branch

if TYPE_CHECKING:
    from spalf.kernels.triton_lists import EntryLists, Scanned

Precision = Literal["float32", "bfloat16"]
"""Type of the operands of matrix products; sums, codes and parameters are float32."""

SPARSE_DENSITY = 1 / 24
"""Share of active entries up to which lists beat dense products."""

ENTRIES_PER_ACTIVE = 4
"""Listed entries for each active one that the lists have room for at first."""


MOST_SORTED = 1024
"""Features of a token that a kernel sorts out at most; for more all features are searched."""


class Parameters(NamedTuple):
    """The SAE's parameters as the kernels see them, float32.

    Attributes:
        W_enc: ``[d_sae, width]``.
        b_enc: ``[d_sae]``.
        threshold: θ, ``[d_sae]``.
        W_dec: ``[d_sae, width]``.
        b_dec: ``[width]``.
        bandwidth: ε ≥ 0, ``[d_sae]``; no gradient.
        operands: encoder and decoder in the type in which products are computed, where somebody
            keeps such copies; no gradient.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    bandwidth: Tensor
    operands: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """How a forward pass is to be computed.

    Attributes:
        surrogate: of the threshold gradient (M6).
        precision: of the operands of matrix products.
        implementation: of the kernels, see `spalf.kernels.choose`.
        sub_rows: tokens, the first ones, whose sub-threshold mass is wanted.
        lists: ``triton`` or ``torch`` for lists of entries; ``None`` computes densely.
        capacity: entries that lists in Triton can take.
        centred: whether W_dec's gradient is that for codes less their mean over the batch, which is
            that for gradients of x̂ less theirs; b_dec has what is left of it (M4).
    """

    surrogate: Surrogate
    precision: Precision
    implementation: Implementation
    sub_rows: int
    lists: Literal["triton", "torch"] | None = None
    capacity: int = 0
    centred: bool = False


class PreActivations(NamedTuple):
    """Pre-activations of a batch, detached.

    Attributes:
        raw: ``[tokens, d_sae]``; without their bias if it is given.
        bias: what ``raw`` lacks, ``[d_sae]`` or ``None``.
        threshold: θ, ``[d_sae]``.
        lists: of those above it, where there are any in Triton.
    """

    raw: Tensor
    bias: Tensor | None
    threshold: Tensor
    lists: EntryLists | None = None

    def of(self, rows: int) -> Tensor:
        """Those of the first tokens, float32 ``[rows, d_sae]``."""
        raw = self.raw[:rows].float()
        return raw if self.bias is None else raw + self.bias

    def strongest(self, rows: int, n: int) -> tuple[Tensor, Tensor]:
        """The n active features of each of the first tokens with the largest pre-activations.

        Returns:
            Their indices, int64 ``[rows, n]``, and 1 where one is active, 0 elsewhere, float32.
        """
        if self.lists is not None and n <= MOST_SORTED:
            from spalf.kernels.triton_lists import strongest

            return strongest(self.lists, rows, n, self.raw.shape[1])
        sample = self.of(rows)
        return strongest_features(sample * (sample > self.threshold), n)


def strongest_features(z: Tensor, max_active: int) -> tuple[Tensor, Tensor]:
    """The features of each token that count for its co-activation, the strongest first.

    Args:
        z: codes of a subset of the batch, ``[tokens, d_sae]``.
        max_active: features considered per token; bounds the cost.

    Returns:
        Their indices, int64 ``[tokens, max_active]``, and 1 where one is active, 0 elsewhere.
    """
    values, indices = z.detach().topk(max_active, dim=1)
    return indices, (values > 0).to(z.dtype)


Meanwhile = Callable[[PreActivations], None]
"""Called with the pre-activations, see `autoencode`."""


@dataclass(frozen=True)
class Autoencoded:
    """One forward pass over a batch.

    Attributes:
        x_hat: z·W_dec + b_dec, float32 ``[tokens, width]``.
        l0: active features of each token, float32 ``[tokens]``.
        subthreshold: Σ_j relu(pre_j)²·(1 − gate_j) of the first tokens, float32 ``[sub_rows]``.
        fired: whether each feature was active at all, bool ``[d_sae]``.
        overflow: whether lists were too short, so that the pass is void; bool scalar.
        pre: pre-activations.
        listed: entries that lists in Triton took or would have taken, int32 scalar; ``None`` where
            there are no such lists.
        capacity: entries they could take.
    """

    x_hat: Tensor
    l0: Tensor
    subthreshold: Tensor
    fired: Tensor
    overflow: Tensor
    pre: PreActivations
    listed: Tensor | None = None
    capacity: int = 0


def autoencode(
    x: Tensor, parameters: Parameters, plan: Plan, meanwhile: Meanwhile | None = None
) -> Autoencoded:
    """Encode and decode a batch; gradients reach ``x`` and the parameters.

    Args:
        x: input of the encoder, float32 ``[tokens, width]``.
        parameters: see `Parameters`.
        plan: see `Plan`; both ways compute the same up to rounding.
        meanwhile: called with the pre-activations; where lists are in Triton, as soon as these are
            filled, so that what it starts on another stream runs beside decoding.
    """
    if plan.lists == "triton":
        return _sparse(x, parameters, plan, meanwhile)
    way = _dense if plan.lists is None else _on_a_cpu
    encoded = way(x, parameters, plan)
    if meanwhile is not None:
        meanwhile(encoded.pre)
    return encoded


def choose_lists(
    x: Tensor, d_sae: int, expected_l0: float, implementation: Implementation
) -> Choice:
    """Whether lists of entries serve a batch better than dense products, and why.

    Args:
        x: a batch, of which only the device matters.
        d_sae: dictionary size.
        expected_l0: active features per token to be expected.
        implementation: what the caller asked for.

    Returns:
        ``triton`` or, on a CPU, ``torch`` for lists; ``reference`` for dense products.
    """
    kernels = choose(x, implementation)
    on_a_cpu = implementation == "auto" and x.device.type == "cpu"
    if kernels.implementation == "reference" and not on_a_cpu:
        return kernels
    density = expected_l0 / d_sae
    if density > SPARSE_DENSITY:
        reason = (
            f"{density:.1%} of the entries are active; from {SPARSE_DENSITY:.1%} on dense is faster"
        )
        return Choice("reference", reason)
    reason = f"{density:.2%} of the entries are active"
    return Choice("torch" if on_a_cpu else "triton", reason)


def list_capacity(tokens: int, d_sae: int, expected_l0: float, margin: float = 1.0) -> int:
    """Room for the entries of a batch: a power of two, at most all of them.

    Args:
        tokens: of the batch.
        d_sae: dictionary size.
        expected_l0: active features per token to be expected.
        margin: grows where the lists have proved too short.
    """
    wanted = ENTRIES_PER_ACTIVE * margin * max(1.0, expected_l0) * tokens
    return min(2 ** math.ceil(math.log2(max(wanted, 1024))), tokens * d_sae)


def _dense(x: Tensor, parameters: Parameters, plan: Plan) -> Autoencoded:
    p, dtype = parameters, _dtype(plan.precision)
    pre = functional.linear(x.to(dtype), p.W_enc.to(dtype), p.b_enc.to(dtype))
    z, l0, sub = jumprelu(
        pre, p.threshold, p.bandwidth, plan.surrogate, implementation=plan.implementation
    )
    if dtype == torch.float32:
        x_hat = torch.addmm(p.b_dec, z, p.W_dec)
    else:
        x_hat = (z @ p.W_dec.to(dtype)).float() + p.b_dec
    if plan.centred:
        mean = z.detach().float().mean(dim=0)
        x_hat = x_hat + mean @ (p.W_dec.detach() - p.W_dec)  # 0 but for its gradient
    fired = (z.detach() > 0).any(dim=0)
    overflow = torch.zeros((), dtype=torch.bool, device=x.device)
    found = PreActivations(pre.detach(), None, p.threshold.detach())
    return Autoencoded(x_hat, l0, sub[: plan.sub_rows], fired, overflow, found)


def _on_a_cpu(x: Tensor, parameters: Parameters, plan: Plan) -> Autoencoded:
    x_hat, l0, sub, fired, pre = TorchListAutoencode.apply(
        x, *parameters[:6], plan.surrogate, plan.sub_rows, plan.centred
    )
    overflow = torch.zeros((), dtype=torch.bool, device=x.device)
    found = PreActivations(pre, None, parameters.threshold.detach())
    return Autoencoded(x_hat, l0, sub, fired, overflow, found)


def _sparse(
    x: Tensor, parameters: Parameters, plan: Plan, meanwhile: Meanwhile | None
) -> Autoencoded:
    # Imported late: machines without a GPU need no triton, and importing it is slow.
    from spalf.kernels.triton_lists import scan

    p, dtype = parameters, _dtype(plan.precision)
    inputs = x.detach().to(dtype)
    encoder, decoder = p.operands or (p.W_enc.detach().to(dtype), p.W_dec.detach().to(dtype))
    raw, bias, threshold = inputs @ encoder.T, p.b_enc.detach(), p.threshold.detach()
    lower = threshold if plan.surrogate == "moreau" else threshold - 0.5 * p.bandwidth
    found = scan(raw, bias, threshold, lower, plan.sub_rows, plan.capacity)
    pre = PreActivations(raw, bias, threshold, found.lists)
    if meanwhile is not None:
        meanwhile(pre)
    x_hat, l0, sub = SparseAutoencode.apply(
        x, *p[:6], Operands(inputs, encoder, decoder), raw, found, plan
    )
    lists = found.lists
    return Autoencoded(x_hat, l0, sub, found.fired, lists.overflow, pre, lists.total, plan.capacity)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


class Operands(NamedTuple):
    """What products are computed from, in one type; detached.

    Attributes:
        inputs: of the encoder, ``[tokens, width]``.
        encoder: ``[d_sae, width]``.
        decoder: ``[d_sae, width]``.
    """

    inputs: Tensor
    encoder: Tensor
    decoder: Tensor


class SparseAutoencode(torch.autograd.Function):
    """What follows the encoder's product and a look at it: (x̂, l0, sub), from lists of entries.

    Its gradients are those of `autoencode` as a whole, of that product too.
    """

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
        operands: Operands,
        raw: Tensor,
        found: Scanned,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        """One walk over each token's entries."""
        from spalf.kernels import triton_sparse

        inputs, encoder, decoder = operands
        lists = found.lists
        x_hat = triton_sparse.decode(lists, lists.value, decoder, b_dec, threshold)
        found.aside.join()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, encoder, decoder, threshold, bandwidth, b_enc, raw)
        ctx.lists, ctx.plan = lists, plan
        return x_hat, found.l0, found.subthreshold

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dx_hat: Tensor | None, dl0: Tensor | None, dsub: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """All gradients in one walk over each feature's entries."""
        from spalf.kernels import triton_sparse

        inputs, encoder, decoder, threshold, bandwidth, b_enc, raw = ctx.saved_tensors
        upstream = (None if dx_hat is None else dx_hat.to(inputs.dtype), dl0, dsub)
        summing = Branch()
        with summing.beside():
            d_b_dec = None if dx_hat is None else dx_hat.sum(dim=0)
        mean = None
        if ctx.plan.centred and d_b_dec is not None:
            summing.join()
            mean = d_b_dec / len(inputs)
        grads = triton_sparse.gradients(
            ctx.lists, threshold, bandwidth, decoder, inputs, upstream, mean,
            moreau=ctx.plan.surrogate == "moreau",
        )  # fmt: skip
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.zeros(inputs.shape, device=inputs.device)
            if grads.entry is not None:
                d_x = triton_sparse.decode(ctx.lists, grads.entry, encoder, d_x[0], threshold)
        if dsub is not None:
            rows = len(dsub)
            value = raw[:rows].float() + b_enc
            d_below = (value.relu() * (value <= threshold)).mul_(2 * dsub.unsqueeze(1))
            grads.encoder.addmm_(d_below.T, inputs[:rows].float())
            grads.bias.add_(d_below.sum(dim=0))
            if d_x is not None:
                d_x[:rows].addmm_(d_below, encoder.float())
        summing.join()
        return (
            d_x, grads.encoder, grads.bias, grads.threshold, grads.decoder, d_b_dec,
            None, None, None, None, None,
        )  # fmt: skip
