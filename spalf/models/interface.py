"""What the rest of the package knows about a language model: one site of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Edit = Callable[[Tensor], Tensor]


@runtime_checkable
class LanguageModel(Protocol):
    """A frozen causal language model, read and patched at one site.

    Attributes:
        name: as the user wrote it.
        hook_point: the site, a TransformerLens hook name.
        d_model: width of the site.
        d_vocab: tokens the model can predict.
        n_layers: transformer blocks.
        device: where it runs; tokens are moved there.
    """

    name: str
    hook_point: str
    d_model: int
    d_vocab: int
    n_layers: int
    device: torch.device

    def activations(self, tokens: Tensor) -> Tensor:
        """Activations at the site, float32 ``[n_seq, seq_len, d_model]``, without gradients.

        Nothing above the site is run. ``tokens`` is int64 ``[n_seq, seq_len]``.
        """
        ...

    def logits(self, tokens: Tensor) -> Tensor:
        """Clean logits, float32 ``[n_seq, seq_len, d_vocab]``, without gradients."""
        ...

    def patched_logits(self, tokens: Tensor, patch: Edit) -> Tensor:
        """Logits, float32 ``[n_seq, seq_len, d_vocab]``, with the site replaced (M16, I8).

        Args:
            tokens: int64 ``[n_seq, seq_len]``.
            patch: maps the site's float32 ``[n_seq, seq_len, d_model]`` to its replacement.
                Gradients flow through what it returns.
        """
        ...

    def unembedding(self) -> Tensor:
        """W_U, float32 ``[d_model, d_vocab]``, as trained: nothing folded into it (M3)."""
        ...


def in_float32(patch: Edit) -> Edit:
    """A patch of float32 values, for a site of any dtype."""
    return lambda site: patch(site.float()).to(site.dtype)


class _SiteReached(Exception):
    """Raised at the site, so that the layers above it are not run."""


class SiteModel(ABC):
    """`LanguageModel` over two things a backend provides: a forward pass and a hook."""

    name: str
    hook_point: str
    d_model: int
    d_vocab: int
    n_layers: int
    device: torch.device

    @abstractmethod
    def _forward(self, tokens: Tensor) -> Tensor:
        """Logits of ``tokens`` in the model's own dtype."""

    @abstractmethod
    def _hooked(self, edit: Edit) -> AbstractContextManager[None]:
        """While it lasts, ``edit`` replaces the site's value, in the model's own dtype."""

    @abstractmethod
    def unembedding(self) -> Tensor:
        """W_U, float32 ``[d_model, d_vocab]``."""

    def activations(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel.activations`."""
        read: list[Tensor] = []

        def stop(site: Tensor) -> Tensor:
            read.append(site.float())
            raise _SiteReached

        with torch.no_grad(), self._hooked(stop), suppress(_SiteReached):
            self._forward(tokens.to(self.device))
        return read[0]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        return self._forward(tokens.to(self.device)).float()

    def patched_logits(self, tokens: Tensor, patch: Edit) -> Tensor:
        """See `LanguageModel.patched_logits`."""
        with self._hooked(in_float32(patch)):
            return self._forward(tokens.to(self.device)).float()

    def patched(self, patch: Edit) -> AbstractContextManager[None]:
        """While it lasts, every forward pass has the site replaced as in `patched_logits`."""
        return self._hooked(in_float32(patch))
