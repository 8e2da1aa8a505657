"""How much the predictions care about each direction at a site: its Fisher information (M8)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spalf.models import LanguageModel


def fisher_information(model: LanguageModel, batches: Iterable[Tensor], *, seed: int = 0) -> Tensor:
    """G = E[∇ₓ log p(y)·∇ₓ log p(y)ᵀ] at the site, with y drawn from the model's own predictions.

    For a small error δ at one position the divergence of the predictions, summed over that and
    all later positions, is about ½·δᵀGδ nats. G is an average: how it differs from token to token
    is lost.

    Args:
        model: frozen language model.
        batches: tokens, int64 ``[n_seq, seq_len]``.
        seed: of the drawn tokens.

    Returns:
        float64 ``[d_model, d_model]``, symmetric, in nats over the square of the activations' unit;
        NaN where the predictions overflow.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64, device=model.device)
    tokens = 0
    for batch in batches:
        gradient = _score(model, batch, generator).flatten(0, 1).double()
        total += gradient.T @ gradient
        tokens += len(gradient)
    return total / max(1, tokens)


def _score(model: LanguageModel, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """∇ₓ Σ log p(y) at the site, ``[n_seq, seq_len, d_model]``, with one y for each position."""
    site: list[Tensor] = []

    def patch(x: Tensor) -> Tensor:
        site.append(x.detach().requires_grad_())
        return site[-1]

    with torch.enable_grad():
        # The last position predicts a token that nobody will see.
        log_p = model.patched_logits(tokens, patch)[:, :-1].flatten(0, 1).log_softmax(dim=-1)
        if log_p.isnan().any():  # nothing can be drawn from these
            return torch.full_like(site[0], torch.nan)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), site)
    return gradient
