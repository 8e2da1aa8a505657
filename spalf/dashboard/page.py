"""The page: one HTML file that holds its style, its program and, compressed, its data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from spalf.checkpoint import naming
from spalf.dashboard.collect import Contexts, FeatureStatistics, window_start
from spalf.dashboard.directions import TokenEffects
from spalf.dashboard.overview import significant

UPLOT = "uPlot-1.6.32"
"""The charting library in ``vendor/``."""

SCRIPTS = ("blocks", "tokens", "charts", "list", "detail", "overview", "main")
"""The page's own program, in the order in which it is put together."""

FEATURES_PER_BLOCK = 64
SEQUENCES_PER_BLOCK = 256
LISTED_TOKENS = 3
"""Promoted tokens named in the list of features."""


@dataclass(frozen=True)
class FeatureData:
    """Everything the page shows of the features.

    Attributes:
        statistics: how often and how strongly each fires.
        contexts: where it fires most.
        sequences: the held-out tokens, ``[n_sequences, seq_len]``, in the order they were seen.
        threshold: θ, ``[d_sae]``.
        effects: tokens promoted and suppressed.
        nearest: indices and cosines of the nearest features, ``[d_sae, k]`` each.
        anchor_tokens: token of each anchored feature, ``[n_anchored]``.
        drift: relative distance and cosine to its direction, ``[n_anchored]`` each.
    """

    statistics: FeatureStatistics
    contexts: Contexts
    sequences: NDArray[Any]
    threshold: NDArray[np.float32]
    effects: TokenEffects
    nearest: tuple[NDArray[np.int64], NDArray[np.float32]]
    anchor_tokens: NDArray[np.int64]
    drift: tuple[NDArray[np.float32], NDArray[np.float32]]


def build_page(
    title: str,
    summary: dict[str, Any],
    data: FeatureData,
    strings: Callable[[Sequence[int]], list[str]],
    provenance: str,
) -> bytes:
    """The whole page as UTF-8; equal arguments give equal bytes.

    Args:
        title: heading and window title.
        summary: as made by `spalf.dashboard.overview`.
        data: the features.
        strings: text of token ids; asked once, for those that occur.
        provenance: where the SAE comes from, one line.
    """
    packing = _Packing(data)
    vocabulary = packing.vocabulary
    blocks = {"table": packing.table(), "strings": strings(vocabulary.tolist())}
    blocks |= dict(packing.feature_blocks()) | dict(packing.sequence_blocks())
    layout = {
        "per_block": {"features": FEATURES_PER_BLOCK, "sequences": SEQUENCES_PER_BLOCK},
        "window": data.contexts.window.shape[2],
    }
    style = _vendored("uPlot.min.css") + "\n" + _asset("page.css")
    scripts = [_vendored("uPlot.iife.min.js"), "\n".join(_asset(f"{s}.js") for s in SCRIPTS)]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        _asset("page.html")
    )
    text = template.render(
        title=title,
        summary=_embedded({**summary, **layout}),
        facts=summary["facts"],
        blocks={name: Markup(_packed(content)) for name, content in blocks.items()},
        style=Markup(style),
        scripts=[Markup(_checked(script)) for script in scripts],
        policy=_policy([style], scripts),
        licence=_vendored("LICENSE"),
        library=UPLOT,
        provenance=provenance,
    )
    return text.encode()


def write_page(path: Path, content: bytes) -> None:
    """Write ``content`` by atomic rename, synced.

    Raises:
        OSError: the disk is full or not writable; ``path`` is as it was then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class _Packing:
    """Lays the features out in blocks. Tokens are numbered anew, by the vocabulary in use."""

    def __init__(self, data: FeatureData) -> None:
        self._data = data
        kept = data.contexts
        self._peak, self._level = kept.peak.cpu().numpy(), _levels(data)
        self._sequence = kept.sequence.cpu().numpy()
        self._position = kept.position.cpu().numpy()
        start = window_start(kept.position, data.sequences.shape[1])
        self._start = start.cpu().numpy()
        self._used = self._peak > 0
        effects = data.effects
        self._ends = {
            "promoted": (effects.promoted.cpu().numpy(), effects.promoted_effect.cpu().numpy()),
            "suppressed": (
                effects.suppressed.cpu().numpy(),
                effects.suppressed_effect.cpu().numpy(),
            ),
        }

    @cached_property
    def _referenced(self) -> NDArray[np.int64]:
        """The sequences that contexts are cut from, ascending."""
        return np.unique(self._sequence[self._used])

    @cached_property
    def _place(self) -> NDArray[np.int64]:
        """Of each context the place of its sequence among those."""
        return np.searchsorted(self._referenced, self._sequence)

    @cached_property
    def _spans(self) -> list[tuple[int, list[int]]]:
        """Of each such sequence the part that some context shows: where it begins, its tokens."""
        length = self._level.shape[2]
        place = self._place[self._used]
        start = self._start[self._used]
        first = np.full(len(self._referenced), np.iinfo(np.int64).max)
        last = np.zeros(len(self._referenced), dtype=np.int64)
        np.minimum.at(first, place, start)
        np.maximum.at(last, place, start + length)
        rows = zip(self._referenced, first, last, strict=True)
        return [(int(a), self._data.sequences[i, a:b].tolist()) for i, a, b in rows]

    @cached_property
    def vocabulary(self) -> NDArray[np.int64]:
        """Ids of every token that occurs on the page, ascending."""
        shown = [np.asarray(tokens) for _, tokens in self._spans]
        shown += [tokens.ravel() for tokens, _ in self._ends.values()]
        shown.append(self._data.anchor_tokens)
        return np.unique(np.concatenate(shown).astype(np.int64))

    def _local(self, tokens: Any) -> list[Any]:
        local: list[Any] = np.searchsorted(self.vocabulary, tokens).tolist()
        return local

    def table(self) -> dict[str, Any]:
        """What the list of features shows: one column each."""
        data, statistics = self._data, self._data.statistics
        distance, cosine = data.drift
        return {
            "fired": statistics.fired.tolist(),
            "max": _rounded(statistics.maximum.tolist()),
            "mean": _rounded(statistics.mean.tolist()),
            "threshold": _rounded(data.threshold.tolist()),
            "fires_on": [self._fires_on(j) for j in range(len(data.threshold))],
            "promotes": self._local(self._ends["promoted"][0][:, :LISTED_TOKENS]),
            "anchor": self._local(data.anchor_tokens),
            "drift": _rounded(distance.tolist()),
            "cosine": _rounded(cosine.tolist()),
        }

    def _fires_on(self, feature: int) -> int | None:
        """The commonest token at the peak of its contexts; among equals the strongest one's."""
        used = self._used[:, feature]
        if not used.any():
            return None
        rows, columns = self._sequence[used, feature], self._position[used, feature]
        peaks = self._data.sequences[rows, columns].tolist()
        token: int = self._local(Counter(peaks).most_common(1)[0][0])  # type: ignore[assignment]
        return token

    def feature_blocks(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """``features-<i>``: what is shown of one feature, a few features in each."""
        for number, start in enumerate(range(0, len(self._data.threshold), FEATURES_PER_BLOCK)):
            stop = min(start + FEATURES_PER_BLOCK, len(self._data.threshold))
            yield f"features-{number}", [self._feature(j) for j in range(start, stop)]

    def _feature(self, feature: int) -> dict[str, Any]:
        statistics, (near, cosine) = self._data.statistics, self._data.nearest
        counts = np.trim_zeros(statistics.histogram[feature].cpu().numpy(), "b")
        return {
            "contexts": [
                self._context(int(k), feature) for k in self._used[:, feature].nonzero()[0]
            ],
            "histogram": counts.tolist(),
            "bin_width": significant(float(statistics.bin_width[feature]), 6),
            "nearest": [near[feature].tolist(), _rounded(cosine[feature].tolist())],
            **{
                name: [self._local(tokens[feature]), _rounded(effect[feature].tolist())]
                for name, (tokens, effect) in self._ends.items()
            },
        }

    def _context(self, place: int, feature: int) -> list[Any]:
        """Sequence, first token, peak's position, peak; then pairs (offset, code in 1/255)."""
        level = self._level[place, feature]
        active = level.nonzero()[0]
        pairs = np.empty(2 * len(active), dtype=np.int64)
        pairs[::2], pairs[1::2] = active, level[active]
        return [
            int(self._place[place, feature]),
            int(self._start[place, feature]),
            int(self._position[place, feature]),
            significant(float(self._peak[place, feature])),
            pairs.tolist(),
        ]

    def sequence_blocks(self) -> Iterator[tuple[str, list[Any]]]:
        """``sequences-<i>``: where the part of each sequence begins that is shown, its tokens."""
        for number, start in enumerate(range(0, len(self._spans), SEQUENCES_PER_BLOCK)):
            some = self._spans[start : start + SEQUENCES_PER_BLOCK]
            yield f"sequences-{number}", [[first, self._local(tokens)] for first, tokens in some]


def _levels(data: FeatureData) -> NDArray[np.uint8]:
    """Codes of the contexts in 1/255 of their feature's largest; 0 only where it is silent."""
    largest = data.statistics.maximum.clamp_min(1e-30)[None, :, None]
    level = (data.contexts.window * (255 / largest)).round().clamp(0, 255)
    return torch.where(data.contexts.window > 0, level.clamp_min(1), 0).byte().cpu().numpy()


def _rounded(values: list[float]) -> list[float | None]:
    return [significant(value) for value in values]


def _packed(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Level 9: a page is made once and read often.
    return base64.b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode()


def _embedded(content: Any) -> Markup:
    """JSON that may stand in a script element, whatever strings it holds."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _checked(script: str) -> str:
    if "</script" in script.lower() or "<!--" in script:
        raise ValueError("a script of the page would end its own element")
    return script


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """A content security policy: the page's own scripts and style by digest, and no network."""
    digests = [" ".join(_digest(text) for text in texts) for texts in (scripts, styles)]
    return (
        f"default-src 'none'; script-src {digests[0]}; style-src {digests[1]}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files("spalf.dashboard") / "assets" / name).read_text(encoding="utf-8")


def _vendored(name: str) -> str:
    return (files("spalf.dashboard") / "vendor" / UPLOT / name).read_text(encoding="utf-8")
