"""Whitening and scale folded into the weights: what every other tool means by a JumpReLU SAE."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spalf.sae import StratifiedSAE


class FoldedSAE(NamedTuple):
    """A JumpReLU SAE on raw activations, float32.

    pre = (x − flag·b_dec)·W_enc + b_enc, z = pre ⊙ 1[pre > threshold], x̂ = z·W_dec + b_dec, where
    flag is ``apply_b_dec_to_input``.

    Attributes:
        W_enc: ``[d_model, d_sae]``.
        b_enc: ``[d_sae]``.
        threshold: θ, ``[d_sae]``.
        W_dec: ``[d_sae, d_model]``.
        b_dec: ``[d_model]``.
        apply_b_dec_to_input: whether the encoder sees x − b_dec or x.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    apply_b_dec_to_input: bool

    def tensors(self) -> dict[str, Tensor]:
        """The five tensors by the names that SAELens and dictionary_learning share."""
        return {name: value for name, value in self._asdict().items() if torch.is_tensor(value)}


@torch.no_grad()
def fold(sae: StratifiedSAE, *, apply_b_dec_to_input: bool) -> FoldedSAE:
    """The same function of x without whitening and without a unit of its own (M4).

    Codes stay what they are: W goes into the encoder, W_enc ← W·W_encᵀ, the mean into its bias,
    and ``scale`` into the decoder.

    Args:
        sae: as trained.
        apply_b_dec_to_input: whether the encoder is to see x − b_dec. As b_dec is close to the
            mean, far less is lost to rounding then where the mean is large.
    """
    # The encoder's bias is a difference of large numbers, so it is worked out in float64.
    W_enc = sae.whitener.apply(sae.W_enc).T.double()
    b_dec = sae.b_dec.double() * sae.scale
    origin = b_dec.float().double() if apply_b_dec_to_input else torch.zeros_like(b_dec)
    return FoldedSAE(
        W_enc=_rounded(W_enc),
        b_enc=_rounded(sae.b_enc.double() + (origin - sae.whitener.mean.double()) @ W_enc),
        threshold=_rounded(sae.threshold),
        W_dec=_rounded(sae.W_dec.double() * sae.scale),
        b_dec=_rounded(b_dec),
        apply_b_dec_to_input=apply_b_dec_to_input,
    )


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def unit_norm_decoder(weights: FoldedSAE) -> FoldedSAE:
    """The same reconstruction with decoder rows of norm 1; codes are in units of x then."""
    norm = torch.linalg.vector_norm(weights.W_dec, dim=1)
    factor = norm.where(norm > 0, 1.0)
    return weights._replace(
        W_enc=weights.W_enc * factor,
        b_enc=weights.b_enc * factor,
        threshold=weights.threshold * factor,
        W_dec=weights.W_dec / factor[:, None],
    )
