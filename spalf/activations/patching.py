"""Putting a reconstruction back at the site, and what that does to the predictions (M16)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from spalf.models import LanguageModel


class Patched(NamedTuple):
    """Next-token losses with the site replaced.

    Attributes:
        kl: KL(p_orig ‖ p_patched) in nats per position, ``[n_seq, seq_len − 1]``.
        ce: cross-entropy of the patched model in nats, ``[n_seq, seq_len − 1]``.
    """

    kl: Tensor
    ce: Tensor


def next_token_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token: ``[n_seq, seq_len − 1]``.

    Args:
        logits: ``[n_seq, seq_len, d_vocab]``.
        tokens: int64 ``[n_seq, seq_len]``.
    """
    predicted, actual = logits[:, :-1].float(), tokens[:, 1:]
    return functional.cross_entropy(predicted.transpose(1, 2), actual, reduction="none")


def next_token_kl(original: Tensor, patched: Tensor) -> Tensor:
    """KL(p_orig ‖ p_patched) in nats at every next-token position: ``[n_seq, seq_len − 1]``.

    Args:
        original: clean logits, ``[n_seq, seq_len, d_vocab]``; constants.
        patched: logits with the site replaced, same shape.
    """
    log_p = original[:, :-1].float().log_softmax(dim=-1)
    log_q = patched[:, :-1].float().log_softmax(dim=-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def patched_losses(
    model: LanguageModel,
    tokens: Tensor,
    patch: Callable[[Tensor], Tensor],
    original: Tensor | None = None,
) -> Patched:
    """Run the model clean and with ``patch`` at its site; gradient flows into the patch.

    Args:
        model: frozen language model.
        tokens: int64 ``[n_seq, seq_len]``.
        patch: maps the site's activations ``[n_seq, seq_len, d_model]`` to their replacement.
        original: clean logits ``[n_seq, seq_len, d_vocab]``, where they are known already.
    """
    if original is None:
        with torch.no_grad():
            original = model.logits(tokens)
    patched = model.patched_logits(tokens, patch)
    return Patched(next_token_kl(original, patched), next_token_cross_entropy(patched, tokens))
