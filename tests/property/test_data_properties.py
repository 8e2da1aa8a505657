from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.data import SequenceStream, split_of
from spalf.data.sources import pieces
from spalf.data.splits import INSTALLED_SHARES, SHARES

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63)


def stream(n: int) -> SequenceStream:
    """Sequence i holds the token i twice."""
    return SequenceStream(np.repeat(np.arange(n, dtype=np.uint16)[:, None], 2, axis=1))


@given(sizes, seeds, st.integers(0, 200), st.integers(0, 50), st.integers(0, 50))
def test_m17_stream_is_seekable(n: int, seed: int, start: int, first: int, second: int) -> None:
    whole = stream(n).sequences(start, first + second, seed=seed)
    parts = [stream(n).sequences(start, first, seed=seed)]
    parts.append(stream(n).sequences(start + first, second, seed=seed))
    assert torch.equal(whole, torch.cat(parts))


@given(sizes, seeds, st.integers(0, 5))
def test_m17_each_epoch_visits_every_sequence_once(n: int, seed: int, epoch: int) -> None:
    tokens = stream(n).sequences(epoch * n, n, seed=seed)
    assert tokens.shape == (n, 2)
    assert sorted(tokens[:, 0].tolist()) == list(range(n))


def test_m17_epochs_and_seeds_have_orders_of_their_own() -> None:
    data = stream(500)
    orders = [data.sequences(start, 500, seed=seed) for start in (0, 500) for seed in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert int((one == other).all(1).sum()) < 10


@given(sizes, st.integers(0, 100), st.integers(0, 100))
def test_without_a_seed_the_file_is_repeated(n: int, start: int, count: int) -> None:
    tokens = stream(n).sequences(start, count)
    assert tokens[:, 0].tolist() == [i % n for i in range(start, start + count)]


@given(st.text(alphabet="ab\n", max_size=400), st.integers(1, 50))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(size <= len(piece) <= 2 * size + 2 for piece in found[:-1])
    assert all(len(piece) <= 2 * size for piece in found[-1:])


def test_split_shares() -> None:
    for shares in (SHARES, INSTALLED_SHARES):
        counts = Counter(split_of(f"key {i}", shares) for i in range(20_000))
        assert set(counts) == set(shares)
        for part, share in shares.items():
            assert abs(counts[part] / 200 - share) < 1.1
