"""Decoding and all gradients of a training step on lists of entries, in Triton.

Of the products of a training step only the encoder's has to be dense. Everything after it touches
the entries listed by `spalf.kernels.triton_lists`, a fraction of a percent of all. Decoding walks
each token's entries, the gradients of the weights each feature's. Every sum has a fixed order, so
results repeat bit for bit: there are no floating-point atomics.

Importing this module imports triton. With ``TRITON_INTERPRET=1`` set before that, the same kernels
run on CPU tensors.
"""

# mypy: allow-untyped-decorators, disable-error-code=no-untyped-def
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spalf.kernels.triton_lists import SEGMENT, EntryLists
from spalf.recording import Branch

DECODE_TILE = (8, 2048)
"""Entries and columns a decoding program handles at a time."""

GRADIENT_ENTRIES, GRADIENT_BYTES = 4, 1024
"""Entries whose gradients a program handles at a time, and bytes of a row for each of its warps."""


@triton.jit
def _decode_kernel(
    token_start_ptr,
    active_end_ptr,
    feature_ptr,
    coefficient_ptr,
    value_ptr,
    threshold_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    capacity,
    width,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = columns < width
    begin = tl.minimum(tl.load(token_start_ptr + row), capacity)
    end = tl.minimum(tl.load(active_end_ptr + row), capacity)
    total = tl.load(bias_ptr + columns, mask=column_inside, other=0.0)
    for first in range(begin, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        inside = entries < end
        feature = tl.load(feature_ptr + entries, mask=inside, other=0)
        coefficient = tl.load(coefficient_ptr + entries, mask=inside, other=0.0)
        value = tl.load(value_ptr + entries, mask=inside, other=0.0)
        theta = tl.load(threshold_ptr + feature, mask=inside, other=0.0)
        # A product, not a choice: a NaN then goes on instead of being gated away.
        coefficient *= (value > theta).to(tl.float32)
        needed = (coefficient != 0.0)[:, None] & column_inside[None, :]
        offsets = feature.to(tl.int64)[:, None] * width + columns[None, :]
        weight = tl.load(weight_ptr + offsets, mask=needed, other=0.0).to(tl.float32)
        total += tl.sum(coefficient[:, None] * weight, axis=0)
    tl.store(out_ptr + row.to(tl.int64) * width + columns, total, mask=column_inside)


@triton.jit
def _threshold_kernel(
    feature_start_ptr,  # [2·d_sae + 1]: active entries of each feature, then the others
    order_ptr,
    token_ptr,
    value_ptr,
    dz_ptr,
    threshold_ptr,
    bandwidth_ptr,
    dl0_ptr,
    dsub_ptr,
    d_bias_ptr,
    d_threshold_ptr,
    sub_rows,
    HAS_DX: tl.constexpr,
    HAS_DL0: tl.constexpr,
    HAS_DSUB: tl.constexpr,
    MOREAU: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    feature = tl.program_id(0)
    begin = tl.load(feature_start_ptr + 2 * feature)
    end = tl.load(feature_start_ptr + 2 * feature + 2)
    theta = tl.load(threshold_ptr + feature)
    epsilon = tl.load(bandwidth_ptr + feature)
    d_bias = tl.zeros((ENTRIES,), dtype=tl.float32)
    d_gate = tl.zeros((ENTRIES,), dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        inside = places < end
        entry = tl.load(order_ptr + places, mask=inside, other=0)
        token = tl.load(token_ptr + entry, mask=inside, other=0)
        value = tl.load(value_ptr + entry, mask=inside, other=0.0)
        gate = ((value > theta) & inside).to(tl.float32)
        u = value - theta
        if MOREAU:
            window = u * gate * (u < epsilon).to(tl.float32)
        else:
            window = ((tl.abs(u) < 0.5 * epsilon) & inside).to(tl.float32)
        slope = tl.zeros((ENTRIES,), dtype=tl.float32)
        if HAS_DX:
            dz = tl.load(dz_ptr + entry, mask=inside, other=0.0)
            slope += dz * theta
            d_bias += dz * gate
        if HAS_DL0:
            slope += tl.load(dl0_ptr + token, mask=inside, other=0.0)
        if HAS_DSUB:
            dsub = tl.load(dsub_ptr + token, mask=inside & (token < sub_rows), other=0.0)
            slope -= dsub * theta * theta
        d_gate += tl.where(inside, slope * window, 0.0)
    # The factor of the window: 1/ε, or 1/γ = 2/ε². An empty window (ε = 0) has no weight.
    safe = tl.where(epsilon > 0.0, epsilon, 1.0)
    if MOREAU:
        safe = 0.5 * safe * safe
    d_threshold = tl.where(epsilon > 0.0, -tl.div_rn(tl.sum(d_gate, axis=0), safe), 0.0)
    tl.store(d_threshold_ptr + feature, d_threshold)
    tl.store(d_bias_ptr + feature, tl.sum(d_bias, axis=0))


@triton.jit
def _row_gradient_kernel(
    segment_feature_ptr,
    segment_start_ptr,
    feature_start_ptr,  # [2·d_sae + 1]: active entries of each feature, then the others
    order_ptr,
    token_ptr,
    value_ptr,
    weight_ptr,  # W_dec [d_sae, width]
    gradient_ptr,  # of the reconstruction, [tokens, width]
    mean_ptr,  # what its rows are to be taken less of for the decoder, [width]
    input_ptr,  # of the encoder, [tokens, width]
    dz_ptr,  # in token order
    d_encoder_ptr,
    d_decoder_ptr,
    rest_ptr,  # [extra segments, 2, width]
    n_features,
    width,
    CENTRED: tl.constexpr,
    SEGMENT_ENTRIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    number = tl.program_id(0)
    feature = tl.load(segment_feature_ptr + number)
    if feature < n_features:
        columns = tl.arange(0, COLUMNS)
        column_inside = columns < width
        segment = number - tl.load(segment_start_ptr + feature)
        begin = tl.load(feature_start_ptr + 2 * feature) + segment * SEGMENT_ENTRIES
        end = tl.minimum(begin + SEGMENT_ENTRIES, tl.load(feature_start_ptr + 2 * feature + 2))
        active_end = tl.minimum(tl.load(feature_start_ptr + 2 * feature + 1), end)
        row = feature.to(tl.int64) * width + columns
        weight = tl.load(weight_ptr + row, mask=column_inside, other=0.0)
        d_decoder = tl.zeros((COLUMNS,), dtype=tl.float32)
        d_encoder = tl.zeros((COLUMNS,), dtype=tl.float32)
        codes = 0.0
        # Which rows an entry needs is looked up while those of the entries before it are on their
        # way: the place in the list two rounds ahead, token and code one round.
        places = begin + tl.arange(0, ENTRIES)
        entry = tl.load(order_ptr + places, mask=places < end, other=0)
        later = tl.load(order_ptr + places + ENTRIES, mask=places + ENTRIES < end, other=0)
        token = tl.load(token_ptr + entry, mask=places < end, other=0).to(tl.int64)
        code = tl.load(value_ptr + entry, mask=places < active_end, other=0.0)
        for _ in range(begin, end, ENTRIES):
            inside = places < end
            # Entries of the window alone need dz, for their threshold, and change no weight.
            active = places < active_end
            at = token[:, None] * width + columns[None, :]
            # One look at a row of the gradient serves both products it is in.
            used = inside[:, None] & column_inside[None, :]
            upstream = tl.load(gradient_ptr + at, mask=used, other=0.0).to(tl.float32)
            used = active[:, None] & column_inside[None, :]
            seen = tl.load(input_ptr + at, mask=used, other=0.0).to(tl.float32)
            places += ENTRIES
            next_token = tl.load(token_ptr + later, mask=places < end, other=0).to(tl.int64)
            next_code = tl.load(value_ptr + later, mask=places < active_end, other=0.0)
            next_later = tl.load(order_ptr + places + ENTRIES, mask=places + ENTRIES < end, other=0)
            dz = tl.sum(upstream * weight.to(tl.float32)[None, :], axis=1)
            tl.store(dz_ptr + entry, dz, mask=inside)
            d_decoder += tl.sum(code[:, None] * upstream, axis=0)
            if CENTRED:
                codes += tl.sum(code, axis=0)
            d_encoder += tl.sum(dz[:, None] * seen, axis=0)
            entry = later
            later = next_later
            token = next_token
            code = next_code
        if CENTRED:
            d_decoder -= codes * tl.load(mean_ptr + columns, mask=column_inside, other=0.0)
        if segment == 0:
            tl.store(d_decoder_ptr + row, d_decoder, mask=column_inside)
            tl.store(d_encoder_ptr + row, d_encoder, mask=column_inside)
        else:
            # Each feature before this one has one segment that is not extra.
            rest = rest_ptr + (number - feature - 1).to(tl.int64) * 2 * width + columns
            tl.store(rest, d_decoder, mask=column_inside)
            tl.store(rest + width, d_encoder, mask=column_inside)


@triton.jit
def _combine_kernel(
    segment_start_ptr,
    rest_ptr,
    d_encoder_ptr,
    d_decoder_ptr,
    width,
    COLUMNS: tl.constexpr,
):
    feature = tl.program_id(0)
    first = tl.load(segment_start_ptr + feature)
    last = tl.load(segment_start_ptr + feature + 1)
    if last - first > 1:
        columns = tl.arange(0, COLUMNS)
        inside = columns < width
        row = feature.to(tl.int64) * width + columns
        d_decoder = tl.load(d_decoder_ptr + row, mask=inside, other=0.0)
        d_encoder = tl.load(d_encoder_ptr + row, mask=inside, other=0.0)
        for number in range(first + 1, last):
            rest = rest_ptr + (number - feature - 1).to(tl.int64) * 2 * width + columns
            d_decoder += tl.load(rest, mask=inside, other=0.0)
            d_encoder += tl.load(rest + width, mask=inside, other=0.0)
        tl.store(d_decoder_ptr + row, d_decoder, mask=inside)
        tl.store(d_encoder_ptr + row, d_encoder, mask=inside)


def decode(
    lists: EntryLists, coefficient: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor
) -> Tensor:
    """Σ over each token's active entries of coefficient·weight row, plus ``bias``; float32.

    Args:
        lists: the entries.
        coefficient: one number per entry, float32 ``[capacity]``.
        weight: contiguous ``[d_sae, width]``.
        bias: float32 ``[width]``.
        threshold: θ, float32 ``[d_sae]``; entries not above it do not count.

    Returns:
        ``[tokens, width]``.
    """
    n_rows, width = lists.token_start.numel() - 1, weight.shape[1]
    out = torch.empty(n_rows, width, device=weight.device)
    entries, columns = DECODE_TILE
    columns = min(columns, triton.next_power_of_2(width))
    _decode_kernel[(n_rows, triton.cdiv(width, columns))](
        lists.token_start, lists.active_end, lists.feature, coefficient, lists.value, threshold,
        weight, bias, out, lists.feature.numel(), width, ENTRIES=entries, COLUMNS=columns,
        num_warps=min(4, max(1, columns // 256)),
    )  # fmt: skip
    return out


class Gradients(NamedTuple):
    """Gradients of the parameters, float32, and of the listed pre-activations.

    Attributes:
        encoder: ``[d_sae, width]``; likewise ``decoder``.
        decoder: of the decoder.
        bias: of the encoder's bias, ``[d_sae]``.
        threshold: ``[d_sae]``.
        entry: of each entry's code, ``[capacity]``; ``None`` if the reconstruction had none.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    threshold: Tensor
    entry: Tensor | None


def gradients(
    lists: EntryLists,
    threshold: Tensor,
    bandwidth: Tensor,
    decoder: Tensor,
    inputs: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    mean: Tensor | None = None,
    *,
    moreau: bool,
) -> Gradients:
    """All gradients that pass through listed entries, in one walk over each feature's.

    Args:
        lists: the entries.
        threshold: θ, float32 ``[d_sae]``.
        bandwidth: ε, float32 ``[d_sae]``.
        decoder: contiguous ``[d_sae, width]``.
        inputs: of the encoder, contiguous ``[tokens, width]``.
        upstream: gradients of the reconstruction ``[tokens, width]``, of l0 ``[tokens]`` and of
            the sub-threshold mass ``[sub_rows]``; ``None`` where an output was not used.
        mean: what the reconstruction's gradient is taken less of for the decoder, float32
            ``[width]``; ``None`` for nothing.
        moreau: the surrogate.
    """
    d_sae, width = decoder.shape
    device = decoder.device
    lists.sorting.join()
    dx, dl0, dsub = (None if grad is None else grad.contiguous() for grad in upstream)
    if dx is None:
        d_entry = rest = None
        d_encoder, d_decoder = torch.zeros(2, d_sae, width, device=device)
    else:
        d_entry, d_encoder, d_decoder, rest = _row_gradients(lists, decoder, dx, mean, inputs)
    d_bias, d_threshold = torch.empty(2, d_sae, device=device)
    aside = Branch()
    with aside.beside():
        # The kernel never follows an absent tensor's pointer; `threshold` only stands in for it.
        _threshold_kernel[(d_sae,)](
            lists.feature_start, lists.order, lists.token, lists.value,
            threshold if d_entry is None else d_entry, threshold, bandwidth,
            threshold if dl0 is None else dl0, threshold if dsub is None else dsub,
            d_bias, d_threshold, 0 if dsub is None else dsub.numel(),
            HAS_DX=dx is not None, HAS_DL0=dl0 is not None, HAS_DSUB=dsub is not None,
            MOREAU=moreau, ENTRIES=32, num_warps=1,
        )  # fmt: skip
    if rest is not None:
        _combine_kernel[(d_sae,)](
            lists.segment_start, rest, d_encoder, d_decoder, width,
            COLUMNS=triton.next_power_of_2(width),
        )  # fmt: skip
    aside.join()
    return Gradients(d_encoder, d_decoder, d_bias, d_threshold, d_entry)


def _row_gradients(
    lists: EntryLists, decoder: Tensor, dx: Tensor, mean: Tensor | None, inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of listed codes ``[capacity]``, and of encoder and decoder, float32 like it.

    Those of the matrices are of each feature's first segment; those of the others come last,
    ``[extra segments, 2, width]``.
    """
    device, (d_sae, width) = dx.device, decoder.shape
    n_segments = lists.segment_feature.numel()
    d_entry = torch.empty(lists.feature.numel(), device=device)
    d_encoder, d_decoder = (torch.empty(d_sae, width, device=device) for _ in range(2))
    rest = torch.empty(max(1, n_segments - d_sae), 2, width, device=device)
    columns = triton.next_power_of_2(width)
    _row_gradient_kernel[(n_segments,)](
        lists.segment_feature, lists.segment_start, lists.feature_start, lists.order, lists.token,
        lists.value, decoder, dx, dx if mean is None else mean, inputs,
        d_entry, d_encoder, d_decoder, rest, d_sae, width, CENTRED=mean is not None,
        SEGMENT_ENTRIES=SEGMENT, ENTRIES=GRADIENT_ENTRIES, COLUMNS=columns,
        num_warps=min(16, max(1, columns * decoder.element_size() // GRADIENT_BYTES)),
    )  # fmt: skip
    return d_entry, d_encoder, d_decoder, rest
