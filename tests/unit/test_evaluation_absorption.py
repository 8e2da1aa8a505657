from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spalf.evaluation import (
    AbsorptionOptions,
    WordActivations,
    collect_words,
    evaluate_absorption,
    first_letter_absorption,
    first_letters,
)
from spalf.evaluation.absorption import _split
from spalf.evaluation.words import WordCollector

LETTERS, WORDS, REPEATS = 8, 20, 3
D_MODEL = LETTERS + LETTERS * WORDS
NOISE = 0.02


class PlantedSAE:
    """Reconstructs x = letter + word exactly; on absorbed words one feature carries both.

    Features [:LETTERS] are the letters', the rest one for each word. On an absorbed word the
    letter's feature is held down and the word's decoder direction is letter + word.
    """

    def __init__(self, absorbed: Tensor, carry: float = 1.0, unit: float = 1.0) -> None:
        self.unit = unit
        self.encoder = torch.eye(D_MODEL)
        self.W_dec = torch.eye(D_MODEL)
        for word in absorbed.nonzero().flatten().tolist():
            letter, feature = word // WORDS, LETTERS + word
            self.encoder[letter, feature] = -1.0
            self.W_dec[feature, letter] = carry

    def encode(self, x: Tensor) -> Tensor:
        pre = (x - 3.0) @ self.encoder.T
        return pre * (pre > 0.5) / self.unit

    def decode(self, z: Tensor) -> Tensor:
        return self.unit * (z @ self.W_dec) + 3.0


def _words(letters_matter: bool = True) -> WordActivations:
    """x = 3 + letter direction + word direction + noise, each word a few times."""
    word = torch.arange(LETTERS * WORDS).repeat(REPEATS)
    letter = word // WORDS
    generator = torch.Generator().manual_seed(0)
    x = 3.0 + NOISE * torch.randn(word.shape[0], D_MODEL, generator=generator)
    rows = torch.arange(word.shape[0])
    x[rows, LETTERS + word] += 1.0
    if letters_matter:
        x[rows, letter] += 1.0
    return WordActivations(x, word, letter)


def _some(share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(LETTERS, WORDS, generator=generator).argsort(1)
    return (order < round(share * WORDS)).flatten()


def test_no_absorption_is_measured_where_there_is_none() -> None:
    result = first_letter_absorption(_words(), PlantedSAE(_some(0)))
    assert result["rate"] == 0
    assert result["probe_accuracy"] > 0.99
    assert result["feature_accuracy"] > 0.99
    assert result["n_cases"] == LETTERS * 6 * REPEATS
    assert result["per_letter"] == dict.fromkeys("abcdefgh", 0.0)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_planted_absorption_is_found_at_its_rate(share: float) -> None:
    """The rate is the share of absorbed words among those held out, letter by letter."""
    absorbed = _some(share)
    options = AbsorptionOptions(test_share=0.5)
    result = first_letter_absorption(_words(), PlantedSAE(absorbed), options=options)
    _, test = _split(_words(), list(range(LETTERS)), options)
    assert result["rate"] == pytest.approx(float(absorbed[test.word].float().mean()))
    for index, rate in enumerate(result["per_letter"].values()):
        own = test.word[test.letter == index]
        assert rate == pytest.approx(float(absorbed[own].float().mean()))
    assert result["rate"] == pytest.approx(share, abs=0.06)


def test_features_that_know_no_letter_are_at_chance() -> None:
    """The activations spell, but the dictionary has the words only."""

    class WordsOnly(PlantedSAE):
        def __init__(self) -> None:
            super().__init__(_some(0))
            self.W_dec = self.W_dec[LETTERS:]

        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x)[:, LETTERS:]

    result = first_letter_absorption(_words(), WordsOnly())
    assert result["probe_accuracy"] > 0.99
    assert result["feature_accuracy"] == pytest.approx(0.5, abs=0.03)


def test_a_silent_letter_without_a_stand_in_is_not_absorption() -> None:
    """Held down, but nothing else carries the letter: a miss, not absorption."""
    result = first_letter_absorption(_words(), PlantedSAE(_some(0.25), carry=0.0))
    assert result["rate"] == 0


@pytest.mark.parametrize(("carry", "is_absorbed"), [(0.3, False), (0.5, True)])
def test_the_stand_in_must_carry_forty_percent(carry: float, is_absorbed: bool) -> None:
    result = first_letter_absorption(_words(), PlantedSAE(_some(0.25), carry=carry))
    assert (result["rate"] > 0) == is_absorbed


def test_the_stand_in_must_align_with_the_probe() -> None:
    """The probe also leans on its training words, so a stand-in's cosine with it is about 0.24."""
    for min_cosine, is_absorbed in ((0.15, True), (0.4, False)):
        options = AbsorptionOptions(min_cosine=min_cosine)
        result = first_letter_absorption(_words(), PlantedSAE(_some(0.25)), options=options)
        assert (result["rate"] > 0) == is_absorbed


@pytest.mark.parametrize("unit", [0.01, 100.0])
def test_the_unit_of_the_codes_does_not_matter(unit: float) -> None:
    plain = first_letter_absorption(_words(), PlantedSAE(_some(0.25)))
    assert plain["rate"] > 0
    assert first_letter_absorption(_words(), PlantedSAE(_some(0.25), unit=unit)) == plain


def test_a_model_that_does_not_spell_is_skipped() -> None:
    result = first_letter_absorption(_words(letters_matter=False), PlantedSAE(_some(0)))
    assert set(result) == {"skipped"} and "does not spell" in result["skipped"]


def test_too_few_words_are_skipped() -> None:
    words = _words()
    few = words.word % WORDS < 3
    some = WordActivations(words.x[few], words.word[few], words.letter[few])
    result = first_letter_absorption(some, PlantedSAE(_some(0)))
    assert set(result) == {"skipped"} and "only 0 first letters" in result["skipped"]


def test_a_feature_split_in_two_is_two_main_features() -> None:
    """Half of each letter's words fire a second letter feature: split, not absorbed."""

    class Split(PlantedSAE):
        def __init__(self) -> None:
            super().__init__(_some(0))
            self.W_dec = torch.cat([self.W_dec, self.W_dec[:LETTERS]])

        def encode(self, x: Tensor) -> Tensor:
            z = super().encode(x)
            is_odd = (z[:, LETTERS:].argmax(1) % 2 == 1).float()[:, None]
            return torch.cat(
                [z[:, :LETTERS] * (1 - is_odd), z[:, LETTERS:], z[:, :LETTERS] * is_odd], 1
            )

    assert first_letter_absorption(_words(), Split())["rate"] == 0
    only_one = replace(AbsorptionOptions(), max_main=1)
    assert first_letter_absorption(_words(), Split(), options=only_one)["rate"] > 0.3


def test_the_measurement_is_deterministic() -> None:
    first, second = (first_letter_absorption(_words(), PlantedSAE(_some(0.25))) for _ in range(2))
    assert first == second


def test_first_letters_of_vocabulary_entries() -> None:
    strings = ["Ġself", "▁Zeta", " return", "def", "x", "Ġa", "9ab", "ab_", "Ġ", "été", "<|eos|>"]
    expected = [18, 25, 17, 3] + [-1] * 7
    assert first_letters(strings).tolist() == expected


class OneHotModel:
    """The activation of token t is e_t, so that rows can be told apart."""

    device = torch.device("cpu")

    def activations(self, tokens: Tensor) -> Tensor:
        return torch.eye(6)[tokens]

    def patched_logits(self, tokens: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
        raise AssertionError("absorption runs the model only up to the site")


VOCABULARY = ["Ġapple", "bee", "!", "Ġcat", "Ġant", "7"]


def test_collected_words_are_the_first_occurrences() -> None:
    batches = [torch.tensor([[0, 2, 0, 1], [0, 0, 5, 1]]), torch.tensor([[1, 1, 4, 2]])]
    seen: list[int] = []
    words = collect_words(
        OneHotModel(),
        batches,
        VOCABULARY,
        options=AbsorptionOptions(occurrences=3),
        progress=seen.append,
    )
    assert words.word.tolist() == [0, 0, 1, 0, 1, 1, 4]
    assert words.letter.tolist() == [0, 0, 1, 0, 1, 1, 0]
    assert torch.equal(words.x, torch.eye(6)[words.word])
    assert seen == [8, 4]


def test_collected_words_are_limited_in_number() -> None:
    batch = torch.tensor([[0, 1, 3, 4]])
    options = AbsorptionOptions(max_words=2)
    assert collect_words(OneHotModel(), [batch], VOCABULARY, options=options).word.numel() == 2


def test_text_without_words_is_skipped() -> None:
    result = evaluate_absorption(
        OneHotModel(), PlantedSAE(_some(0)), [torch.tensor([[2, 5]])], VOCABULARY
    )
    assert set(result) == {"skipped"}


@pytest.mark.parametrize("left_after", [0, 1, 2])
def test_i10_collecting_words_can_be_left_and_taken_up(left_after: int) -> None:
    batches = [torch.tensor([[0, 2, 0, 1], [0, 0, 5, 1]]), torch.tensor([[1, 1, 4, 2]])]
    options = AbsorptionOptions(occurrences=3)
    first, second = (WordCollector(OneHotModel(), VOCABULARY, options) for _ in range(2))
    for batch in batches[:left_after]:
        first.add(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[left_after:]:
        second.add(batch)
    whole = collect_words(OneHotModel(), batches, VOCABULARY, options=options)
    assert torch.equal(second.words().word, whole.word)
    assert torch.equal(second.words().x, whole.x)
