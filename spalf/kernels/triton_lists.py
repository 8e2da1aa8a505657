"""Lists of the entries of a batch that a training step touches, in Triton.

One pass over the pre-activations counts the entries (token, feature) whose gate is open or which
lie in the surrogate's window, and leaves two bits for each pair; a second one turns the bits into
lists, token by token; a stable sort gives the same list feature by feature, and which features
fired. Decoding needs only the former, so the sort runs beside it.

Nothing here waits for the host. The lists have a fixed capacity; what does not fit is left out,
and `EntryLists.overflow` says so.

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

from spalf.recording import Branch

COUNT_TILE = (4, 32)
"""Tokens and words of 32 pre-activations a counting program looks at in one go."""

SUBTHRESHOLD_COLUMNS = 512
"""Pre-activations whose sub-threshold mass a program adds up in one go."""

SEGMENT = 256
"""Entries of one feature after which another program takes over in adding up its gradients."""

FILL_WORDS, FILL_WARPS = 256, 1
"""Words of 32 pre-activations from which a program writes entries at a time, and its warps."""


class EntryLists(NamedTuple):
    """The entries of a batch, token by token and feature by feature; int32 unless said otherwise.

    Attributes:
        token_start: first entry of each token, ``[tokens + 1]``; its active ones come first.
        active_end: where they end, ``[tokens]``.
        feature: feature of each entry, in token order, ``[capacity]``.
        token: token of each entry, ``[capacity]``.
        value: pre-activation of each entry, float32 ``[capacity]``.
        feature_start: places in ``order`` at which each feature's active entries begin, and at
            which those of its window alone do, ``[2·d_sae + 1]``.
        order: the entries in feature order, active ones first, int64 ``[capacity]``.
        segment_start: first segment of each feature, ``[d_sae + 1]``; a feature has one for each
            `SEGMENT` of its entries that has begun, and at least one.
        segment_feature: feature of each segment, d_sae where there is none any more,
            ``[d_sae + capacity/SEGMENT]``.
        total: entries there are, also of those there was no room for, a scalar.
        overflow: whether entries had to be left out, bool scalar.
        sorting: to be joined before anything that is in feature order is used.
        key: what is sorted, ``[capacity]``, in as few bits as will do.
    """

    token_start: Tensor
    active_end: Tensor
    feature: Tensor
    token: Tensor
    value: Tensor
    feature_start: Tensor
    order: Tensor
    segment_start: Tensor
    segment_feature: Tensor
    total: Tensor
    overflow: Tensor
    sorting: Branch
    key: Tensor


class Scanned(NamedTuple):
    """What one look at the pre-activations yields besides the lists.

    Attributes:
        l0: active features of each token, float32 ``[tokens]``.
        subthreshold: Σ_j relu(pre_j)²·(1 − gate_j) of the first tokens, float32 ``[sub_rows]``.
        fired: whether each feature was active at all, bool ``[d_sae]``; not to be used before
            ``lists.sorting`` has been joined, nor where there was an overflow.
        lists: the entries.
        aside: to be joined before ``subthreshold`` is used.
    """

    l0: Tensor
    subthreshold: Tensor
    fired: Tensor
    lists: EntryLists
    aside: Branch


@triton.jit
def _bit_count(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _count_kernel(
    raw_ptr,
    bias_ptr,
    threshold_ptr,
    lower_ptr,
    l0_ptr,
    listed_ptr,
    mask_ptr,  # [2, tokens, words]: active entries, then those of the window alone
    n_rows,
    n_columns,
    n_words,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = rows < n_rows
    bits = (1 << tl.arange(0, 32))[None, None, :]
    active = tl.zeros((ROWS, WORDS), dtype=tl.int32)
    listed = tl.zeros((ROWS, WORDS), dtype=tl.int32)
    for first in range(0, n_words, WORDS):
        # What belongs to a feature is read once for all rows of the program.
        words = first + tl.arange(0, WORDS)
        columns = words[:, None] * 32 + tl.arange(0, 32)[None, :]
        inside = columns < n_columns
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        theta = tl.load(threshold_ptr + columns, mask=inside, other=float("inf"))
        lower = tl.load(lower_ptr + columns, mask=inside, other=float("inf"))
        at = rows.to(tl.int64)[:, None, None] * n_columns + columns[None, :, :]
        used = row_inside[:, None, None] & inside[None, :, :]
        value = tl.load(raw_ptr + at, mask=used, other=0.0).to(tl.float32) + bias[None, :, :]
        # Not "greater": a NaN then counts as active, and reaches the reconstruction instead of
        # being gated away.
        gate = tl.sum(tl.where(value <= theta[None, :, :], 0, bits), axis=2)
        entry = tl.sum(tl.where(value <= lower[None, :, :], 0, bits), axis=2)
        at = rows.to(tl.int64)[:, None] * n_words + words[None, :]
        kept = row_inside[:, None] & (words < n_words)[None, :]
        tl.store(mask_ptr + at, gate, mask=kept)
        tl.store(mask_ptr + n_rows * n_words + at, entry ^ gate, mask=kept)
        active += _bit_count(gate.to(tl.uint32, bitcast=True))
        listed += _bit_count(entry.to(tl.uint32, bitcast=True))
    tl.store(l0_ptr + rows, tl.sum(active, axis=1).to(tl.float32), mask=row_inside)
    tl.store(listed_ptr + rows, tl.sum(listed, axis=1), mask=row_inside)


@triton.jit
def _subthreshold_kernel(
    raw_ptr,
    bias_ptr,
    threshold_ptr,
    sub_ptr,
    n_columns,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    # Kept apart by column until the end: a reduction in the loop would cost more than all the rest.
    sub = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, n_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < n_columns
        value = tl.load(raw_ptr + row.to(tl.int64) * n_columns + columns, mask=inside, other=0.0)
        value = value.to(tl.float32) + tl.load(bias_ptr + columns, mask=inside, other=0.0)
        theta = tl.load(threshold_ptr + columns, mask=inside, other=0.0)
        below = tl.where((value > 0.0) & (value <= theta) & inside, value, 0.0)
        sub += below * below
    tl.store(sub_ptr + row, tl.sum(sub, axis=0))


@triton.jit
def _fill_kernel(
    raw_ptr,
    bias_ptr,
    mask_ptr,
    token_start_ptr,
    active_end_ptr,
    feature_ptr,
    key_ptr,
    token_ptr,
    value_ptr,
    capacity,
    n_rows,
    n_columns,
    n_words,
    FIRST_KEY: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0)
    start = tl.load(token_start_ptr + row)
    for near in tl.static_range(2):
        for first in range(0, n_words, WORDS):
            words = first + tl.arange(0, WORDS)
            at = (near * n_rows + row).to(tl.int64) * n_words + words
            rest = tl.load(mask_ptr + at, mask=words < n_words, other=0).to(tl.uint32, bitcast=True)
            count = _bit_count(rest)
            place = start + tl.cumsum(count, axis=0) - count
            start += tl.sum(count, axis=0)
            # One entry of each word at a time, lowest bit first.
            for _ in range(tl.max(count, axis=0)):
                lowest = rest & (~rest + 1)
                column = words * 32 + _bit_count(lowest - 1)
                kept = (rest != 0) & (place < capacity)
                value = tl.load(
                    raw_ptr + row.to(tl.int64) * n_columns + column, mask=kept, other=0.0
                ).to(tl.float32)
                value += tl.load(bias_ptr + column, mask=kept, other=0.0)
                tl.store(feature_ptr + place, column, mask=kept)
                key = FIRST_KEY + 2 * column + near
                tl.store(key_ptr + place, key.to(key_ptr.dtype.element_ty), mask=kept)
                tl.store(token_ptr + place, row + tl.zeros_like(place), mask=kept)
                tl.store(value_ptr + place, value, mask=kept)
                rest = rest ^ lowest
                place += 1
        if near == 0:
            tl.store(active_end_ptr + row, start)


@triton.jit
def _strongest_kernel(
    token_start_ptr,
    active_end_ptr,
    feature_ptr,
    value_ptr,
    index_ptr,  # [rows, n]
    active_ptr,  # [rows, n]
    n,
    capacity,
    n_features,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(token_start_ptr + row)
    end = tl.minimum(tl.load(active_end_ptr + row), capacity)
    ranks = tl.arange(0, WIDTH)
    # A value above 0 is ordered as the integer of its bits is; the feature decides between equals.
    best = tl.full((WIDTH,), -1, dtype=tl.int64)
    for first in range(begin, end, WIDTH):
        places = first + ranks
        value = tl.load(value_ptr + places, mask=places < end, other=0.0)
        feature = tl.load(feature_ptr + places, mask=places < end, other=0).to(tl.int64)
        key = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | feature
        key = tl.where(places < end, key, -1)
        # Of two sorted rows, one falling and one rising, the larger of each pair are the largest.
        best = tl.sort(tl.maximum(best, tl.sort(key)), descending=True)
    found = best >= 0
    # Places left over point to different features, so that none is added to by very many.
    spread = (row * n + ranks) % n_features
    index = tl.where(found, best & 0x7FFFFFFF, spread.to(tl.int64))
    tl.store(index_ptr + row * n + ranks, index, mask=ranks < n)
    tl.store(active_ptr + row * n + ranks, tl.where(found, 1.0, 0.0), mask=ranks < n)


def strongest(lists: EntryLists, rows: int, n: int, n_features: int) -> tuple[Tensor, Tensor]:
    """The features of each of the first tokens with the largest pre-activations.

    Args:
        lists: of a batch.
        rows: tokens.
        n: features wanted of each.
        n_features: that there are.

    Returns:
        Their indices, int64 ``[rows, n]``, the strongest first, and 1 where one is active, else 0,
        float32; where there are fewer than n, the other indices are arbitrary.
    """
    device = lists.value.device
    index = torch.empty(rows, n, dtype=torch.int64, device=device)
    active = torch.empty(rows, n, device=device)
    width = triton.next_power_of_2(n)
    _strongest_kernel[(rows,)](
        lists.token_start, lists.active_end, lists.feature, lists.value, index, active, n,
        lists.feature.numel(), n_features, WIDTH=width, num_warps=min(8, max(1, width // 64)),
    )  # fmt: skip
    return index, active


def scan(
    raw: Tensor, bias: Tensor, threshold: Tensor, lower: Tensor, sub_rows: int, capacity: int
) -> Scanned:
    """List the entries of a batch whose pre-activation lies above ``lower``.

    Args:
        raw: pre-activations without their bias, contiguous ``[tokens, d_sae]``.
        bias: added to them in float32, ``[d_sae]``.
        threshold: θ, float32 ``[d_sae]``.
        lower: bound of the entries listed, at most θ, float32 ``[d_sae]``.
        sub_rows: tokens whose sub-threshold mass is wanted, the first ones.
        capacity: most entries the lists can take.
    """
    n_rows, n_columns = raw.shape
    device = raw.device
    l0 = torch.empty(n_rows, device=device)
    listed = torch.empty(n_rows, dtype=torch.int32, device=device)
    n_words = triton.cdiv(n_columns, 32)
    mask = torch.empty(2, n_rows, n_words, dtype=torch.int32, device=device)
    rows, words = COUNT_TILE
    _count_kernel[(triton.cdiv(n_rows, rows),)](
        raw, bias, threshold, lower, l0, listed, mask, n_rows, n_columns, n_words,
        ROWS=rows, WORDS=words, num_warps=4,
    )  # fmt: skip
    token_start = torch.zeros(n_rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(listed, dim=0, dtype=torch.int32, out=token_start[1:])
    active_end = torch.empty(n_rows, dtype=torch.int32, device=device)
    # Every byte of a key costs a pass over all of them. Room that is not used comes last: it has
    # the largest key, and where an entry has that as well, sorting leaves the two in order.
    key_type = torch.int16 if n_columns <= 2**15 else torch.int32
    first_key = torch.iinfo(key_type).min if key_type == torch.int16 else 0
    key = torch.full((capacity,), torch.iinfo(key_type).max, dtype=key_type, device=device)
    feature, token = torch.empty(2, capacity, dtype=torch.int32, device=device)
    value = torch.empty(capacity, device=device)
    _fill_kernel[(n_rows,)](
        raw, bias, mask, token_start, active_end, feature, key, token, value,
        capacity, n_rows, n_columns, n_words, FIRST_KEY=first_key, WORDS=FILL_WORDS,
        num_warps=FILL_WARPS,
    )  # fmt: skip
    sub = torch.empty(sub_rows, device=device)
    aside = Branch()
    if sub_rows:
        with aside.beside():
            _subthreshold_kernel[(sub_rows,)](
                raw, bias, threshold, sub, n_columns, COLUMNS=SUBTHRESHOLD_COLUMNS, num_warps=4
            )
    total = token_start[-1:]
    sorting = Branch()
    with sorting.beside():
        by_feature = torch.sort(key, stable=True)
        keys = torch.arange(first_key, first_key + 2 * n_columns, dtype=key_type, device=device)
        starts = torch.searchsorted(by_feature.values, keys, out_int32=True)
        feature_start = torch.cat([starts, total.clamp_max(capacity)])
        fired = feature_start[1::2] > feature_start[:-1:2]
        segment_start, segment_feature = _segments(feature_start, capacity)
    lists = EntryLists(
        token_start, active_end, feature, token, value, feature_start, by_feature.indices,
        segment_start, segment_feature, total[0], total[0] > capacity, sorting, key,
    )  # fmt: skip
    return Scanned(l0, sub, fired, lists, aside)


def _segments(feature_start: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """``segment_start`` and ``segment_feature`` of `EntryLists`."""
    counts = feature_start[2::2] - feature_start[:-1:2]
    segments = (counts + SEGMENT - 1).div(SEGMENT, rounding_mode="floor").clamp_min(1)
    start = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(segments, dim=0, dtype=torch.int32, out=start[1:])
    most = len(counts) + capacity // SEGMENT
    places = torch.arange(most, dtype=torch.int32, device=counts.device)
    return start, torch.searchsorted(start[1:], places, right=True, out_int32=True)
