"""Some rows of a parameter as a leaf of their own."""

from __future__ import annotations

from torch import Tensor, nn


class ParameterRows:
    """Rows of a matrix that enter the loss by themselves.

    Indexing the parameter would make autograd fill a gradient of its full size for a handful of
    rows. These are a leaf instead, whose gradient is added to the parameter's after the backward
    pass.

    Args:
        parameter: ``[rows, width]``.
        index: a slice, or int64 indices of any shape, which may repeat.
    """

    def __init__(self, parameter: nn.Parameter, index: slice | Tensor) -> None:
        self._parameter, self._index = parameter, index
        self.values = parameter.detach()[index].requires_grad_()

    def add_gradient(self) -> None:
        """Add what the backward pass left here to the parameter's gradient."""
        gradient, total = self.values.grad, self._parameter.grad
        if gradient is None or total is None:
            return
        if isinstance(self._index, slice):
            total[self._index] += gradient
        else:
            # With accumulate the order of the sum is fixed on a GPU too; index_add_ leaves it open.
            total.index_put_((self._index,), gradient, accumulate=True)
