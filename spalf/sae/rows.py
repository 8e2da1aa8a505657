"""Some rows of a parameter as a leaf of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from spalf.kernels import Implementation, choose

if TYPE_CHECKING:
    from spalf.kernels.triton_rows import SortedPlaces


class ParameterRows:
    """Rows of a matrix that enter the loss by themselves.

    Indexing the parameter would make autograd fill a gradient of its full size for a handful of
    rows. These are a leaf instead, whose gradient is added to the parameter's after the backward
    pass.

    Args:
        parameter: ``[rows, width]``.
        index: a slice, or int64 indices of any shape, which may repeat.
        implementation: of the addition at indices, see `spalf.kernels.choose`.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        index: slice | Tensor,
        implementation: Implementation = "auto",
    ) -> None:
        self._parameter, self._index = parameter, index
        self.values = parameter.detach()[index].requires_grad_()
        self._places: SortedPlaces | None = None
        fused = choose(parameter, implementation).implementation == "triton"
        if fused and isinstance(index, Tensor):
            # Imported late: machines without a GPU need no triton, and importing it is slow.
            from spalf.kernels.triton_rows import sort_places

            self._places = sort_places(index, len(parameter))

    def add_gradient(self) -> None:
        """Add what the backward pass left here to the parameter's gradient."""
        gradient, total = self.values.grad, self._parameter.grad
        if gradient is None or total is None:
            return
        if isinstance(self._index, slice):
            total[self._index] += gradient
        elif self._places is not None:
            from spalf.kernels.triton_rows import add_rows

            add_rows(total, gradient, self._places)
        else:
            # With accumulate the order of the sum is fixed on a GPU too; index_add_ leaves it open.
            total.index_put_((self._index,), gradient, accumulate=True)
