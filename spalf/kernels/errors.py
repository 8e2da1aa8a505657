"""The error of a reconstruction in a metric (M8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spalf.kernels.dispatch import Implementation, choose


def squared_errors(
    x_hat: Tensor,
    x: Tensor,
    scale: float,
    factor: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """E‖rR‖² and E‖r‖² of the residual r = x/scale − x̂.

    Args:
        x_hat: reconstruction of x/scale, ``[tokens, width]``; the only one with a gradient.
        x: activations, ``[tokens, width]``.
        scale: of the activations.
        factor: R of the metric, ``[width, width]``; ``None`` for the identity.
        dtype: of the operands of the product rR.
        implementation: ``auto`` (see `spalf.kernels.choose`), ``triton`` or ``reference``.

    Returns:
        The error in the metric, and the plain one without a gradient; scalars of the type of
        ``x_hat``.
    """
    if choose(x_hat, implementation).implementation == "triton":
        # Imported late: machines without a GPU need no triton, and importing it is slow.
        from spalf.kernels.triton_error import TritonErrors

        errors: tuple[Tensor, Tensor] = TritonErrors.apply(x_hat, x, scale, factor, dtype)
        return errors
    target = x / scale
    mse = functional.mse_loss(x_hat, target, reduction="sum") / len(x)
    if factor is None:
        return mse, mse.detach()
    product = (target - x_hat).to(dtype) @ factor.to(dtype)
    return product.to(x_hat.dtype).square().sum(dim=-1).mean(), mse.detach()
