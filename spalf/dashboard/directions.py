"""What can be read off the decoder: promoted tokens, near features, drift of the anchors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = 2**24
"""Products worked on at a time: 64 MiB of float32."""


@dataclass(frozen=True)
class TokenEffects:
    """Tokens whose logits a feature moves most, by the direct path to the output.

    Attributes:
        promoted: token ids, largest effect first, int64 ``[d_sae, k]``.
        promoted_effect: logits per unit of the feature's code, ``[d_sae, k]``.
        suppressed: token ids, most negative effect first, int64 ``[d_sae, k]``.
        suppressed_effect: as above.
    """

    promoted: Tensor
    promoted_effect: Tensor
    suppressed: Tensor
    suppressed_effect: Tensor


@torch.no_grad()
def token_effects(directions: Tensor, unembedding: Tensor, n_tokens: int, k: int) -> TokenEffects:
    """Decoder directions times the unembedding, relative to the mean over tokens.

    A shift of all logits changes no probability, so the mean is taken out. The final norm of the
    model and its later layers are left out of account.

    Args:
        directions: what one unit of each feature's code adds to the site, ``[d_sae, d_model]``.
        unembedding: W_U, ``[d_model, d_vocab]``.
        n_tokens: tokens the tokenizer knows; columns beyond it are padding.
        k: tokens kept at either end.
    """
    W_U = unembedding[:, :n_tokens]
    centred = W_U - W_U.mean(dim=1, keepdim=True)
    k = min(k, centred.shape[1])
    ends: list[tuple[Tensor, ...]] = []
    for some in directions.split(max(1, _CHUNK_ELEMENTS // centred.shape[1])):
        effect = some.float() @ centred
        top, bottom = effect.topk(k, dim=1), effect.topk(k, dim=1, largest=False)
        ends.append((top.indices, top.values, bottom.indices, bottom.values))
    return TokenEffects(*(torch.cat(parts) for parts in zip(*ends, strict=True)))


@torch.no_grad()
def nearest_features(W_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The features with the most similar decoder directions.

    Args:
        W_dec: ``[d_sae, d_model]``.
        k: how many of them.

    Returns:
        Indices int64 and cosines, each ``[d_sae, min(k, d_sae − 1)]``, nearest first.
    """
    unit = F.normalize(W_dec.float(), dim=1)
    k, found, start = min(k, len(unit) - 1), [], 0
    for rows in unit.split(max(1, _CHUNK_ELEMENTS // len(unit))):
        cosine = rows @ unit.T
        own = torch.arange(len(rows), device=rows.device)
        cosine[own, start + own] = -torch.inf
        found.append(cosine.topk(k, dim=1))
        start += len(rows)
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


@torch.no_grad()
def anchor_drift(W_dec: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """How far each anchored column has moved from its token's direction.

    Args:
        W_dec: ``[d_sae, d_model]``, the anchored stratum first.
        anchors: W_A⁰, ``[n_anchored, d_model]``.

    Returns:
        ‖w − w⁰‖/‖w⁰‖, the distance that M8 bounds, and cos(w, w⁰); both ``[n_anchored]``.
    """
    columns = W_dec[: len(anchors)].float()
    start = anchors.to(columns)
    distance = torch.linalg.vector_norm(columns - start, dim=1)
    length = torch.linalg.vector_norm(start, dim=1).clamp_min(1e-12)
    return distance / length, F.cosine_similarity(columns, start, dim=1)
