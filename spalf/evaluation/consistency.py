"""Do runs that differ only in their seed find the same features?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def pw_mcc(first: Tensor, second: Tensor, *, chunk: int = 1024) -> float:
    """Agreement of two dictionaries: mean over features of the best cosine in the other one.

    After PW-MCC (arXiv 2505.20254), averaged over both directions. There each feature is assigned
    a partner of its own; here two may share one, which bounds the assigned score from above and
    needs ``chunk × d_sae`` numbers instead of ``d_sae²``. Anchored columns start out equal in
    every run, so compare the free stratum.

    Args:
        first: decoder ``[d_sae, d_model]``; columns need no particular norm.
        second: decoder ``[d_sae', d_model]``.
        chunk: rows of ``first`` compared at a time.

    Returns:
        A number in [−1, 1]; 1 for dictionaries equal up to order and positive scale.

    Raises:
        ValueError: a dictionary is empty.
    """
    if not (first.shape[0] and second.shape[0]):
        raise ValueError("a dictionary without features has no consistency")
    a, b = F.normalize(first.float(), dim=1), F.normalize(second.to(first.device).float(), dim=1)
    best_of_b = torch.full((b.shape[0],), -torch.inf, device=b.device)
    best_of_a = []
    for rows in a.split(chunk):
        cosine = rows @ b.T
        best_of_a.append(cosine.amax(dim=1))
        best_of_b = torch.maximum(best_of_b, cosine.amax(dim=0))
    return float((torch.cat(best_of_a).double().mean() + best_of_b.double().mean()) / 2)


def mean_pairwise_consistency(decoders: Sequence[Tensor], *, chunk: int = 1024) -> float | None:
    """Mean `pw_mcc` over all pairs of decoders; ``None`` with fewer than two."""
    scores = [pw_mcc(a, b, chunk=chunk) for a, b in combinations(decoders, 2)]
    return sum(scores) / len(scores) if scores else None
