"""What a reconstruction at the site does to the predictions (M16)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
