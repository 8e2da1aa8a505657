"""What every feature fires on, from one pass over held-out tokens.

Memory does not grow with the number of tokens, but for the tokens themselves: counts, one
histogram and the strongest contexts of each feature are updated batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spalf.errors import UserError

CONTEXTS = 16
"""Contexts kept of each feature, at most one from a sequence."""

TOKENS_BEFORE, WINDOW = 40, 64
"""A context is ``WINDOW`` tokens of its sequence, the peak after ``TOKENS_BEFORE`` of them."""

BINS = 64
"""Histogram bins of each feature; between half and all of them are in use."""

_CHUNK_ELEMENTS = 2**23
"""Codes worked on at a time: 32 MiB of float32."""


class Coder(Protocol):
    """What is asked of a sparse autoencoder here."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes z ≥ 0 ``[tokens, d_sae]`` of activations ``[tokens, d_model]``."""
        ...


@dataclass(frozen=True)
class FeatureStatistics:
    """How often and how strongly each feature fires.

    Attributes:
        tokens: activations seen.
        fired: on how many of them a feature is active, int64 ``[d_sae]``.
        maximum: largest code, ``[d_sae]``; 0 for a feature that never fired.
        mean: mean code where active, ``[d_sae]``; 0 for a feature that never fired.
        histogram: active codes by bin, int64 ``[d_sae, BINS]``; bins are of equal width and
            the first begins at 0.
        bin_width: width of each feature's bins, ``[d_sae]``.
    """

    tokens: int
    fired: Tensor
    maximum: Tensor
    mean: Tensor
    histogram: Tensor
    bin_width: Tensor


@dataclass(frozen=True)
class Contexts:
    """The strongest contexts of each feature, strongest first; a peak of 0 is an empty place.

    Attributes:
        peak: largest code in the context's sequence, ``[CONTEXTS, d_sae]``.
        sequence: its index in the order in which sequences were seen, int64, same shape.
        position: of the peak in the sequence, int64, same shape.
        window: codes of the context's tokens, ``[CONTEXTS, d_sae, min(WINDOW, seq_len)]``.
    """

    peak: Tensor
    sequence: Tensor
    position: Tensor
    window: Tensor


class Collector:
    """Statistics and strongest contexts of every feature, updated batch by batch.

    Args:
        sae: encodes activations.
        unit: a positive code of each feature to start its histogram from, ``[d_sae]``: the
            range is this times the smallest sufficient power of 2.
        seq_len: tokens in a sequence.
        contexts: how many to keep of each feature.
    """

    def __init__(self, sae: Coder, unit: Tensor, seq_len: int, contexts: int = CONTEXTS) -> None:
        self._sae, self._kept, self._seq_len = sae, contexts, seq_len
        self._sequences = 0
        self._window = min(WINDOW, seq_len)
        d_sae, device = unit.shape[0], unit.device
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._bins = _Histogram(unit)
        self._peak = torch.zeros(contexts, d_sae, device=device)
        self._sequence = torch.zeros(contexts, d_sae, dtype=torch.int64, device=device)
        self._position = torch.zeros_like(self._sequence)
        self._codes = torch.zeros(contexts, d_sae, self._window, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in the activations ``[n_seq, seq_len, d_model]`` of the next sequences.

        Raises:
            UserError: a code is not finite.
        """
        d_sae = self._fired.shape[0]
        for some in x.split(max(1, _CHUNK_ELEMENTS // (self._seq_len * d_sae))):
            z = self._sae.encode(some.flatten(0, 1)).float()
            peak, position = z.view(len(some), self._seq_len, d_sae).max(dim=1)
            if not torch.isfinite(peak).all():
                remedy = "not all features are finite on held-out tokens; train it again"
                raise UserError("SAE", None, remedy)
            self._count(z, peak.amax(dim=0))
            self._keep(z.view(len(some), self._seq_len, d_sae), peak, position)
            self._sequences += len(some)

    def _count(self, z: Tensor, maximum: Tensor) -> None:
        self._total += z.sum(dim=0, dtype=torch.float64)
        self._bins.widen(maximum)
        token, feature = z.nonzero(as_tuple=True)
        self._fired += torch.bincount(feature, minlength=z.shape[1])
        self._bins.add(feature, z[token, feature])

    def _keep(self, z: Tensor, peak: Tensor, position: Tensor) -> None:
        """Merge the sequences of ``z [n_seq, seq_len, d_sae]`` into the strongest so far."""
        better = (peak > self._peak[-1]).any(dim=0).nonzero().squeeze(1)
        if not len(better):
            return
        index = torch.arange(len(z), device=z.device)[:, None] + self._sequences
        known = (self._peak, self._sequence, self._position)
        new = (peak, index.expand_as(peak), position)
        # Stable, and those seen earlier stand first: ties fall the same way for every batch size.
        merged = [torch.cat([a[:, better], b[:, better]]) for a, b in zip(known, new, strict=True)]
        order = merged[0].sort(dim=0, descending=True, stable=True).indices[: self._kept]
        for kept, values in zip(known, merged, strict=True):
            kept[:, better] = values.gather(0, order)
        self._keep_windows(z, better, order)

    def _keep_windows(self, z: Tensor, better: Tensor, order: Tensor) -> None:
        """Move the windows of old contexts to their new ``order`` and cut those of new ones."""
        old = self._codes[:, better]
        moved = order.clamp(max=self._kept - 1)[..., None].expand(-1, -1, self._window)
        codes = old.gather(0, moved)
        place, column = (order >= self._kept).nonzero(as_tuple=True)
        feature = better[column]
        sequence = order[place, column] - self._kept
        start = window_start(self._position[place, feature], self._seq_len)
        inside = start[:, None] + torch.arange(self._window, device=z.device)
        codes[place, column] = z[sequence[:, None], inside, feature[:, None]]
        self._codes[:, better] = codes

    def contexts(self) -> Contexts:
        """The strongest contexts so far."""
        return Contexts(self._peak, self._sequence, self._position, self._codes)

    def statistics(self) -> FeatureStatistics:
        """Counts and histograms so far."""
        return FeatureStatistics(
            tokens=self._sequences * self._seq_len,
            fired=self._fired,
            maximum=self._peak[0],
            mean=(self._total / self._fired.clamp_min(1)).float(),
            histogram=self._bins.counts,
            bin_width=self._bins.range / BINS,
        )


def window_start(position: Tensor, seq_len: int) -> Tensor:
    """First token of the context whose peak is at ``position``."""
    return (position - TOKENS_BEFORE).clamp(0, seq_len - min(WINDOW, seq_len))


class _Histogram:
    """Bins of equal width from 0; where a value lies beyond, pairs of bins become one."""

    def __init__(self, unit: Tensor) -> None:
        self.range = unit.detach().float().clamp_min(1e-12).clone()
        self.counts = torch.zeros(len(unit), BINS, dtype=torch.int64, device=unit.device)

    def widen(self, maximum: Tensor) -> None:
        """Double ranges until every ``maximum [d_sae]`` lies inside."""
        while (beyond := maximum >= self.range).any():
            pairs = self.counts[beyond].view(-1, BINS // 2, 2).sum(dim=2)
            self.counts[beyond] = torch.cat([pairs, torch.zeros_like(pairs)], dim=1)
            self.range[beyond] *= 2

    def add(self, feature: Tensor, value: Tensor) -> None:
        """Count values, each of the feature with the given index."""
        position = (value / self.range[feature] * BINS).long().clamp(0, BINS - 1)
        seen = torch.bincount(feature * BINS + position, minlength=self.counts.numel())
        self.counts += seen.view_as(self.counts)
