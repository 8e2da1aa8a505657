from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spalf.evaluation import anchor_drift, decoder_cosines, mean_pairwise_consistency, pw_mcc


def test_columns_that_have_not_moved_have_cosine_one() -> None:
    W_dec = torch.randn(10, 4)
    drift = anchor_drift(W_dec, 2.0 * W_dec[:6])
    assert drift["n_anchored"] == 6
    assert drift["mean_cosine"] == pytest.approx(1) and drift["min_cosine"] == pytest.approx(1)


def test_known_drift() -> None:
    directions = torch.eye(4)[:2]
    W_dec = torch.tensor([[1.0, 1.0, 0, 0], [0, 3.0, 0, 0], [9.0, 9.0, 9.0, 9.0]])
    drift = anchor_drift(W_dec, directions)
    assert drift["min_cosine"] == pytest.approx(0.5**0.5)
    assert drift["mean_cosine"] == pytest.approx((1 + 0.5**0.5) / 2)


def test_drift_without_anchors_or_with_too_many() -> None:
    W_dec = torch.randn(3, 4)
    none = {"mean_cosine": None, "min_cosine": None, "n_anchored": 0}
    assert anchor_drift(W_dec, W_dec[:0]) == none
    with pytest.raises(ValueError, match="4 token directions for 3"):
        anchor_drift(W_dec, torch.randn(4, 4))


def test_dictionaries_equal_up_to_order_and_scale_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 8, generator=generator)
    order = torch.randperm(50, generator=generator)
    second = first[order] * torch.rand(50, 1, generator=generator).add(0.1)
    assert pw_mcc(first, second, chunk=7) == pytest.approx(1, abs=1e-6)
    assert pw_mcc(first, -second, chunk=7) < 0.99


def test_known_consistency() -> None:
    """Best cosines: of first 1 and 1/√2; of second 1, 0 and 1/√2."""
    first = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    second = torch.tensor([[5.0, 0, 0], [0, 0, 1.0], [-1.0, 1.0, 0]])
    root = 0.5**0.5
    expected = ((1 + root) / 2 + (1 + 0 + root) / 3) / 2
    assert pw_mcc(first, second) == pytest.approx(expected)
    assert pw_mcc(second, first) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk: int) -> None:
    first, second = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(1))
    cosine = F.normalize(first) @ F.normalize(second).T
    expected = float(cosine.amax(1).mean() + cosine.amax(0).mean()) / 2
    assert pw_mcc(first, second, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_consistency_over_seeds_is_the_mean_over_pairs() -> None:
    decoders = list(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(2)))
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(pw_mcc(decoders[i], decoders[j]) for i, j in pairs) / 3
    assert mean_pairwise_consistency(decoders) == pytest.approx(expected)
    assert mean_pairwise_consistency(decoders[:1]) is None


def test_an_empty_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match="without features"):
        pw_mcc(torch.zeros(0, 4), torch.randn(2, 4))


def test_neighbours_of_a_known_dictionary() -> None:
    """Two equal columns, one at right angles, one opposite to the first."""
    W_dec = torch.tensor([[1.0, 0], [2.0, 0], [0, 3.0], [-1.0, 0]])
    found = decoder_cosines(W_dec)
    assert found["nearest_mean"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert found["near"] == {"0.5": 0.5, "0.7": 0.5, "0.9": 0.5}
    # Of the twelve ordered pairs six are parallel; the width is 2.
    assert found["mean_square"] == pytest.approx(2 * 6 / 12)
    assert sum(found["nearest_histogram"]) == 4
    assert found["nearest_histogram"][-1] == 2


def test_isotropic_directions_have_mean_square_one_over_the_width() -> None:
    W_dec = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    found = decoder_cosines(W_dec)
    assert found["mean_square"] == pytest.approx(1, abs=0.02)
    quantiles = list(found["nearest_quantiles"].values())
    assert quantiles == sorted(quantiles)
    assert found["near"]["0.9"] == 0


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_the_cosines(chunk: int) -> None:
    W_dec = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    whole, cut = decoder_cosines(W_dec), decoder_cosines(W_dec, chunk=chunk)
    assert cut["nearest_mean"] == pytest.approx(whole["nearest_mean"])
    assert cut["mean_square"] == pytest.approx(whole["mean_square"])


def test_one_feature_has_no_neighbour() -> None:
    assert set(decoder_cosines(torch.randn(1, 4)).values()) == {None}
