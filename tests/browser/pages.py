"""Pages for the tests: a planted one whose contents are known, and a large made-up one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from spalf.dashboard import (
    Collector,
    Contexts,
    FeatureData,
    FeatureStatistics,
    OverviewInputs,
    TokenEffects,
    anchor_drift,
    build_page,
    nearest_features,
    overview,
    token_effects,
)
from spalf.dashboard.collect import BINS, CONTEXTS, WINDOW

HOSTILE = [
    "</script>",
    "<!--",
    "<img src=x onerror=alert(1)>",
    "\"&amp;'",
    "\u2028{{ title }}",
    "\u202eright to left",
    " leading",
    "\n",
]
"""Tokens that would do harm in a page that does not escape them."""

N_TOKENS = 64
SEQ_LEN, N_SEQUENCES, D_SAE, N_ANCHORED = 80, 48, 24, 4
SILENT = 7
"""A feature of the planted page that never fires."""


class OneTokenSAE:
    """Feature j fires on token j, the more strongly the earlier it stands in the sequence."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        tokens, strength = x[:, 0].long(), x[:, 1]
        fires = tokens[:, None] == torch.arange(D_SAE)
        fires[:, SILENT] = False
        return fires * strength[:, None]


def strings(ids: Any) -> list[str]:
    """Text of a token: hostile ones first, then words."""
    return [HOSTILE[i] if i < len(HOSTILE) else f" word{i}" for i in ids]


def planted_tokens() -> torch.Tensor:
    """Sequences ``[N_SEQUENCES, SEQ_LEN]`` of tokens drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, N_TOKENS, (N_SEQUENCES, SEQ_LEN), generator=generator)


def activations(tokens: torch.Tensor) -> torch.Tensor:
    """What `OneTokenSAE` encodes: the token, and how strongly its feature is to fire."""
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    return torch.stack([tokens.float(), 2 - position / SEQ_LEN], dim=-1)


def planted_data(
    batch: int = 8, n_anchored: int = N_ANCHORED, with_thresholds: bool = True
) -> FeatureData:
    tokens = planted_tokens()
    threshold = torch.full((D_SAE,), 0.5)
    collector = Collector(OneTokenSAE(), threshold, SEQ_LEN)
    for some in tokens.split(batch):
        collector.add(activations(some))
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(D_SAE, 16, generator=generator)
    W_U = torch.randn(16, N_TOKENS, generator=generator)
    near, cosine = nearest_features(W_dec, 5)
    distance, to_anchor = anchor_drift(W_dec, W_dec[:n_anchored] + 0.1)
    if not with_thresholds:
        threshold = torch.full_like(threshold, torch.nan)
    return FeatureData(
        collector.statistics(),
        collector.contexts(),
        tokens.numpy().astype(np.int32),
        threshold.numpy(),
        token_effects(W_dec, W_U, N_TOKENS, 6),
        (near.numpy(), cosine.numpy()),
        np.arange(n_anchored),
        (distance.numpy(), to_anchor.numpy()),
    )


def planted_page(title: str = "planted", **inputs: Any) -> bytes:
    data = planted_data()
    return build_page(title, summary(data, N_ANCHORED, **inputs), data, strings, "made up")


def plain_page() -> bytes:
    """The page of an SAE with no anchors, no thresholds, no metrics log and nothing beside it."""
    data = planted_data(n_anchored=0, with_thresholds=False)
    given = summary(data, 0, frontier=[], sweep=[], log=[])
    return build_page("plain", given, data, strings, "made up")


def summary(data: FeatureData, n_anchored: int, **inputs: Any) -> dict[str, Any]:
    """The overview of made-up measurements; ``inputs`` replace fields of `OverviewInputs`."""
    cell: dict[str, Any] = {
        "method": "spalf",
        "variant": "",
        "model": "m",
        "model_name": "m",
        "hook_point": "h",
        "L0_target": 8.0,
        "seed": 0,
    }
    frontier = [
        {
            "method": "spalf",
            "variant": "",
            "seed": 0,
            "L0_target": target,
            "l0": target,
            "explained_variance": 1 - 1 / target,
            "delta_ce": 2 / target,
        }
        for target in (4.0, 8.0, 16.0)
    ]
    sweep = [
        {"factor": f, "l0": 8 / f, "explained_variance": 0.8, "delta_ce": 0.3 * f}
        for f in (0.5, 1.0, 2.0)
    ]
    given = OverviewInputs(
        **{"cell": cell, "phase": "phase2", "frontier": frontier, "sweep": sweep, "log": log()}
        | inputs
    )
    fired = data.statistics.fired.numpy()
    return overview(given, fired, data.threshold, n_anchored, data.statistics.tokens)


def log(rows: int = 200) -> list[dict[str, Any]]:
    """A metrics log whose last twentieth is Phase 2."""
    names = [f"{k}_{c}" for k in ("lambda", "rho", "g") for c in ("faith", "drift", "ortho")]
    return [
        {
            "step": 10 * i,
            "tokens": 10_240 * i,
            "phase": 1 if i < 0.95 * rows else 2,
            "l0": 8 + 24 * math.exp(-i / 30) + math.sin(i),
            "l0_ref": 8 + 24 * math.exp(-i / 30),
            "explained_variance": 0.8 - math.exp(-i / 20),
            "log_tau": math.exp(-i / 50),
            "dead_fraction": 0.01,
            **{name: math.sin(i / (9 + k)) ** 2 for k, name in enumerate(names)},
        }
        for i in range(rows)
    ]


def large_page(d_sae: int = 8192, tokens: int = 131_072, vocabulary: int = 50_257) -> bytes:
    """A page of the size of a real one: words by Zipf's law, contexts anywhere among them."""
    generator = np.random.default_rng(0)
    seq_len = 128
    ranks = 1 / np.arange(1, vocabulary + 1)
    sequences = generator.choice(vocabulary, (tokens // seq_len, seq_len), p=ranks / ranks.sum())
    letters = np.vectorize(chr)(generator.integers(97, 123, (vocabulary, 6)))
    words = ["".join(row) for row in letters]
    data = _large_data(generator, d_sae, sequences.astype(np.int32), vocabulary)
    return build_page(
        f"made-up · {d_sae} features",
        summary(data, d_sae // 16),
        data,
        lambda ids: [f" {words[i]}" for i in ids],
        "made up",
    )


def _large_data(
    generator: np.random.Generator, d_sae: int, sequences: Any, vocabulary: int
) -> FeatureData:
    n_sequences, seq_len = sequences.shape
    fired = np.minimum(generator.geometric(1 / 400, d_sae), sequences.size // 4)
    peak = np.sort(generator.gamma(4, 1, (CONTEXTS, d_sae)).astype(np.float32), axis=0)[::-1]
    # An activation on the peak and on a tenth of the tokens around it.
    window = generator.random((CONTEXTS, d_sae, WINDOW), dtype=np.float32) * peak[..., None]
    window *= generator.random(window.shape, dtype=np.float32) < 0.1
    histogram = generator.poisson(np.linspace(fired / 8, 0, BINS, axis=1))
    n_anchored = d_sae // 16
    effect = np.sort(generator.normal(size=(d_sae, 10)).astype(np.float32))[:, ::-1].copy()
    promoted, suppressed = torch.from_numpy(generator.integers(0, vocabulary, (2, d_sae, 10)))
    logits = torch.from_numpy(effect)
    moved = generator.random((2, n_anchored)).astype(np.float32)
    return FeatureData(
        FeatureStatistics(
            sequences.size,
            torch.from_numpy(fired),
            torch.from_numpy(peak[0].copy()),
            torch.from_numpy(peak[0] / 2),
            torch.from_numpy(histogram),
            torch.from_numpy(peak[0] / BINS),
        ),
        Contexts(
            torch.from_numpy(peak.copy()),
            torch.from_numpy(generator.integers(0, n_sequences, (CONTEXTS, d_sae))),
            torch.from_numpy(generator.integers(0, seq_len, (CONTEXTS, d_sae))),
            torch.from_numpy(window),
        ),
        sequences,
        generator.gamma(4, 0.2, d_sae).astype(np.float32),
        TokenEffects(promoted, logits, suppressed, -logits),
        (generator.integers(0, d_sae, (d_sae, 8)), effect[:, :8]),
        generator.integers(0, vocabulary, n_anchored),
        (moved[0], moved[1]),
    )
