"""Activations at words that are single tokens: what first-letter absorption is measured on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spalf.evaluation.protocols import PatchableModel, Progress

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r"[\u0120\u2581 ]?([A-Za-z]{2,})")  # byte-level BPE or SentencePiece word start


@dataclass(frozen=True)
class AbsorptionOptions:
    """Thresholds of the measurement; the first four are those of the literature.

    Attributes:
        min_cosine: a stand-in's decoder direction must align with the probe at least this well.
        min_share: and carry at least this share of the token's projection on the probe.
        split_gain: a further main feature must raise the k-sparse probe's F1 by this much.
        max_main: main features per letter at most.
        occurrences: activations kept of each word, so that frequent words do not decide.
        max_words: words used at most.
        test_share: share of each letter's words held out for testing.
        min_words: words a letter needs to take part.
        min_letters: letters needed to measure at all.
        min_probe_accuracy: mean balanced accuracy of the probes on unseen words (chance is 0.5)
            below which the model is taken not to spell, and nothing is measured.
        seed: decides the split and which words are dropped beyond ``max_words``.
    """

    min_cosine: float = 0.025
    min_share: float = 0.4
    split_gain: float = 0.03
    max_main: int = 10
    occurrences: int = 8
    max_words: int = 8192
    test_share: float = 0.3
    min_words: int = 5
    min_letters: int = 5
    min_probe_accuracy: float = 0.65
    seed: int = 0


@dataclass(frozen=True, eq=False)
class WordActivations:
    """Activations at single-token words.

    Attributes:
        x: float32 ``[n, d_model]``.
        word: token id of each row, int64 ``[n]``.
        letter: first letter of each row, 0 to 25, int64 ``[n]``.
    """

    x: Tensor
    word: Tensor
    letter: Tensor


def first_letters(token_strings: Sequence[str]) -> Tensor:
    """First letter of every token, int64 ``[d_vocab]``: 0 to 25, or −1 if it is not a word.

    A word is at least two ASCII letters, with or without a leading space marker.
    """
    matches = (_WORD.fullmatch(text) for text in token_strings)
    return torch.tensor([ALPHABET.index(m[1][0].lower()) if m else -1 for m in matches])


def collect_words(
    model: PatchableModel,
    sequences: Iterable[Tensor],
    token_strings: Sequence[str],
    *,
    options: AbsorptionOptions | None = None,
    progress: Progress | None = None,
) -> WordActivations:
    """Activations of the first few occurrences of each word; arguments as `evaluate_absorption`.

    To be collected once and shared by every SAE of the site.
    """
    words = WordCollector(model, token_strings, options)
    for batch in sequences:
        words.add(batch)
        if progress is not None:
            progress(batch.numel())
    return words.words()


class WordCollector:
    """`collect_words` batch by batch; what it has gathered can be saved in between.

    Args:
        model: the language model; runs only up to the site.
        token_strings: the vocabulary as the tokenizer spells it, by token id.
        options: thresholds.
    """

    def __init__(
        self,
        model: PatchableModel,
        token_strings: Sequence[str],
        options: AbsorptionOptions | None = None,
    ) -> None:
        chosen = options or AbsorptionOptions()
        self._model = model
        self._letter_of = _limit_words(first_letters(token_strings), chosen)
        self._room = torch.where(self._letter_of >= 0, chosen.occurrences, 0)
        self._x: list[Tensor] = []
        self._words: list[Tensor] = []

    def add(self, sequences: Tensor) -> None:
        """Take in one batch of tokens ``[n_seq, seq_len]``."""
        flat = sequences.flatten().cpu()
        wanted = _first_occurrences(flat, self._room)
        if not wanted.numel():
            return
        x = self._model.activations(sequences.to(self._model.device)).flatten(0, 1)
        self._x.append(x[wanted.to(x.device)].float())
        self._words.append(flat[wanted])
        self._room -= torch.bincount(flat[wanted], minlength=self._room.shape[0])

    def words(self) -> WordActivations:
        """What was collected."""
        if not self._x:
            nothing = torch.zeros(0, dtype=torch.int64)
            return WordActivations(torch.zeros(0, 0), nothing, nothing)
        word, x = torch.cat(self._words), torch.cat(self._x)
        return WordActivations(x, word.to(x.device), self._letter_of[word].to(x.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far; empty before the first word."""
        if not self._x:
            return {}
        return {"room": self._room, "x": torch.cat(self._x), "words": torch.cat(self._words)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; going on is then bit-identical."""
        if state:
            self._room = state["room"].cpu().clone()
            self._x = [state["x"].to(self._model.device)]
            self._words = [state["words"].cpu()]


def _limit_words(letter_of: Tensor, options: AbsorptionOptions) -> Tensor:
    """``letter_of`` with all but ``max_words`` words, drawn at random, marked as no words."""
    words = (letter_of >= 0).nonzero().flatten()
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(words.shape[0], generator=generator)
    limited = letter_of.clone()
    limited[words[order[options.max_words :]]] = -1
    return limited


def _first_occurrences(tokens: Tensor, room: Tensor) -> Tensor:
    """Positions in ``tokens [n]`` that are among the first ``room[token]`` of their token."""
    order = tokens.argsort(stable=True)
    grouped = tokens[order]
    positions = torch.arange(tokens.shape[0])
    is_start = torch.ones_like(grouped, dtype=torch.bool)
    is_start[1:] = grouped[1:] != grouped[:-1]
    start = torch.where(is_start, positions, 0).cummax(0).values
    return order[positions - start < room[grouped]].sort().values
