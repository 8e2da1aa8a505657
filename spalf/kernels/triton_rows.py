"""Adding rows to a matrix at places that may repeat, in Triton.

What PyTorch has for this either sorts the places when the rows are there already, which costs more
than the addition, or leaves the order of a sum open. Here the places are sorted as soon as they are
known.

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


class SortedPlaces(NamedTuple):
    """Rows of a matrix, in ascending order.

    Attributes:
        order: which row comes where, int64 ``[n]``; stable.
        start: places in ``order`` at which each row of the matrix begins, int32 ``[rows + 1]``.
    """

    order: Tensor
    start: Tensor


@triton.jit
def _add_rows_kernel(total_ptr, added_ptr, order_ptr, start_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    begin = tl.load(start_ptr + row)
    end = tl.load(start_ptr + row + 1)
    if begin < end:
        columns = tl.arange(0, COLUMNS)
        inside = columns < width
        at = row.to(tl.int64) * width + columns
        total = tl.load(total_ptr + at, mask=inside, other=0.0)
        for place in range(begin, end):
            source = tl.load(order_ptr + place)
            total += tl.load(added_ptr + source * width + columns, mask=inside, other=0.0)
        tl.store(total_ptr + at, total, mask=inside)


def sort_places(index: Tensor, rows: int) -> SortedPlaces:
    """Sort the places, int64 of any shape and each below ``rows``, at which rows will be added."""
    places = index.flatten().int().sort(stable=True)
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=index.device)
    return SortedPlaces(places.indices, torch.searchsorted(places.values, bounds, out_int32=True))


def add_rows(total: Tensor, added: Tensor, places: SortedPlaces) -> None:
    """``total[index[i]] += added[i]`` for all i, in an order that does not change.

    Args:
        total: contiguous float32 ``[rows, width]``; changed in place.
        added: float32 ``[..., width]``, one row for each place.
        places: from `sort_places`.
    """
    rows, width = total.shape
    columns = triton.next_power_of_2(width)
    _add_rows_kernel[(rows,)](
        total, added.contiguous(), *places, width, COLUMNS=columns,
        num_warps=min(8, max(1, columns // 256)),
    )  # fmt: skip
