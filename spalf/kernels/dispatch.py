"""The choice between the PyTorch reference and the Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from spalf.errors import UserError
from spalf.kernels.reference import ReferenceJumpReLU, Surrogate

Implementation = Literal["auto", "triton", "reference"]
"""What a caller may ask for."""

COMPUTE_DTYPES = (torch.float32, torch.bfloat16)
"""Types of pre-activation the kernels are written and tested for."""


class Choice(NamedTuple):
    """An implementation and why it was chosen, in words fit for a log line.

    ``torch`` is the choice of `spalf.kernels.choose_lists` alone: lists of entries in PyTorch.
    """

    implementation: Literal["triton", "torch", "reference"]
    reason: str


def choose(tensor: Tensor, implementation: Implementation = "auto") -> Choice:
    """Which implementation serves ``tensor``, and why.

    ``auto`` takes Triton for a CUDA tensor where triton is installed, and the reference otherwise.

    Raises:
        UserError: unknown ``implementation``, or ``triton`` asked for where it cannot run.
    """
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise UserError("implementation", implementation, f"choose one of {known}")
    if implementation == "reference":
        return Choice("reference", "asked for")
    installed = importlib.util.find_spec("triton") is not None
    if implementation == "triton":
        return _triton_on_request(tensor, installed)
    if not tensor.is_cuda:
        return Choice("reference", f"the tensor is on {tensor.device.type}, not on a CUDA device")
    if not installed:
        return Choice("reference", "triton is not installed")
    return Choice("triton", "the tensor is on a CUDA device and triton is installed")


def _triton_on_request(tensor: Tensor, installed: bool) -> Choice:
    if not installed:
        raise UserError("implementation", "triton", "triton is not installed; use 'auto'")
    if tensor.is_cuda:
        return Choice("triton", "asked for")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Choice("triton", "asked for, through Triton's interpreter")
    remedy = f"cannot run on a {tensor.device.type} tensor; use 'auto' or set TRITON_INTERPRET=1"
    raise UserError("implementation", "triton", remedy)


def jumprelu(
    pre: Tensor,
    threshold: Tensor,
    bandwidth: Tensor,
    surrogate: Surrogate = "rectangle",
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """JumpReLU codes, their L0 and the sub-threshold mass, with surrogate gradients (M4, M6, M7).

    Forward, with gate = 1[pre > θ] (so pre = θ is inactive): z = pre ⊙ gate,
    l0 = Σ_j gate_j, sub = Σ_j relu(pre_j)²·(1 − gate_j). Sums are kept in float32.

    Backward, with u = pre − θ:
    d_pre = dz·gate + 2·dsub·relu(pre)·(1 − gate); the L0 gradient does not reach ``pre``.
    d_θ_j = −Σ_b (dz·θ_j + dl0 − dsub·θ_j²)·w, the gradient of every term through the gate, where
    w = 1[|u| < ε/2]/ε for ``rectangle`` and w = u/γ·1[0 < u < ε], γ = ε²/2, for ``moreau``.
    ``bandwidth`` receives no gradient. Outputs left out of the loss cost nothing going back.
    A NaN in ``pre`` comes out as a NaN in z. Double backward is not supported.

    Args:
        pre: pre-activations, [tokens, d_sae], float32 or bfloat16.
        threshold: θ, [d_sae], float32 whatever the type of ``pre``; same units as ``pre``.
        bandwidth: ε ≥ 0, [d_sae], same units; a feature with ε = 0 gets no threshold gradient.
        surrogate: whose weight w the threshold gradient uses.
        implementation: ``auto`` (see `choose`), ``triton`` or ``reference``.

    Returns:
        z [tokens, d_sae] in the type of ``pre``; l0 [tokens] and sub [tokens] in float32.

    Raises:
        UserError: shapes, types or devices that do not fit, or an unknown name.
    """
    _check(pre, threshold, bandwidth, surrogate)
    function: Any = ReferenceJumpReLU
    if choose(pre, implementation).implementation == "triton":
        # Imported late: machines without a GPU need no triton, and importing it is slow.
        from spalf.kernels.triton_jumprelu import TritonJumpReLU

        function = TritonJumpReLU
    codes: tuple[Tensor, Tensor, Tensor] = function.apply(pre, threshold, bandwidth, surrogate)
    return codes


def _check(pre: Tensor, threshold: Tensor, bandwidth: Tensor, surrogate: str) -> None:
    if surrogate not in get_args(Surrogate):
        raise UserError("surrogate", surrogate, f"choose one of {', '.join(get_args(Surrogate))}")
    if pre.ndim != 2:
        raise UserError("pre", tuple(pre.shape), "give [tokens, d_sae]; flatten leading axes")
    if pre.dtype not in COMPUTE_DTYPES:
        raise UserError("pre", pre.dtype, "convert to torch.float32 or torch.bfloat16")
    for name, vector in (("threshold", threshold), ("bandwidth", bandwidth)):
        if vector.shape != pre.shape[1:]:
            remedy = f"give one number per feature, [{pre.shape[1]}]"
            raise UserError(name, tuple(vector.shape), remedy)
        if vector.dtype != torch.float32:
            raise UserError(name, vector.dtype, "keep it in torch.float32 whatever the type of pre")
        if vector.device != pre.device:
            raise UserError(name, str(vector.device), f"move it to {pre.device}, where pre is")
