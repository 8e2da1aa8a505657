"""First-letter feature absorption (arXiv 2409.14507), on a model's own vocabulary and text.

A feature "starts with s" is absorbed where it stays silent on some s-word and a feature of that
word alone carries the letter instead. Words are single tokens of the vocabulary, met in held-out
text; ground truth is a linear probe for each letter, trained on other words than it is tested on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spalf.evaluation.probes import (
    Probes,
    balanced_accuracy,
    chunks,
    codes_on_host,
    f1_score,
    fit_probes,
    most_correlated,
)
from spalf.evaluation.protocols import PatchableModel, Progress, SparseCoder
from spalf.evaluation.words import (
    ALPHABET,
    AbsorptionOptions,
    WordActivations,
    WordCollector,
    collect_words,
)

_SPARSE_ITERATIONS = 30


def evaluate_absorption(
    model: PatchableModel,
    sae: SparseCoder,
    sequences: Iterable[Tensor],
    token_strings: Sequence[str],
    *,
    options: AbsorptionOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """First-letter absorption of one SAE on held-out text.

    Args:
        model: the language model; runs only up to the site.
        sae: the trained SAE.
        sequences: batches of held-out tokens ``[n_seq, seq_len]``.
        token_strings: the vocabulary as the tokenizer spells it, by token id.
        options: thresholds; the defaults are meant to serve every model.
        progress: called with the number of tokens after each batch.

    Returns:
        As `first_letter_absorption`.
    """
    chosen = options or AbsorptionOptions()
    words = collect_words(model, sequences, token_strings, options=chosen, progress=progress)
    return first_letter_absorption(words, sae, options=chosen)


class AbsorptionMeasurement(WordCollector):
    """`evaluate_absorption` batch by batch; what it has gathered can be saved in between.

    Args:
        model: the language model; runs only up to the site.
        sae: the trained SAE.
        token_strings: the vocabulary as the tokenizer spells it, by token id.
    """

    def __init__(
        self, model: PatchableModel, sae: SparseCoder, token_strings: Sequence[str]
    ) -> None:
        super().__init__(model, token_strings)
        self._sae = sae

    def result(self) -> dict[str, Any]:
        """As `first_letter_absorption`."""
        return first_letter_absorption(self.words(), self._sae)


@torch.no_grad()
def first_letter_absorption(
    words: WordActivations, sae: SparseCoder, *, options: AbsorptionOptions | None = None
) -> dict[str, Any]:
    """The share of correctly probed words whose letter feature was absorbed.

    Returns:
        ``rate`` (over all test cases), ``per_letter`` (letter → rate), ``probe_accuracy``
        (balanced, on unseen words, mean over letters), ``feature_accuracy`` (the same of probes
        that see each letter's main features only) and ``n_cases``; or ``skipped``: why there is
        no measurement.
    """
    chosen = options or AbsorptionOptions()
    letters = _eligible_letters(words, chosen)
    if len(letters) < chosen.min_letters:
        return {
            "skipped": f"only {len(letters)} first letters have {chosen.min_words} words or more "
            f"in the evaluation text; {chosen.min_letters} are needed"
        }
    train, test = _split(words, letters, chosen)
    probes = fit_probes(train.x, _one_hot(train.letter, letters))
    right = balanced_accuracy(probes.logits(test.x) > 0, _one_hot(test.letter, letters))
    accuracy = float(right.mean())
    if accuracy < chosen.min_probe_accuracy:
        return {
            "skipped": f"the site does not spell: balanced probe accuracy on unseen words is "
            f"{accuracy:.3f}, below {chosen.min_probe_accuracy}"
        }
    main = _main_features(train, sae, letters, chosen)
    absorbed, cases = _count_absorbed(test, sae, probes, main, letters, chosen)
    if not cases.any():
        return {"skipped": "no test word is recognised by its letter's probe"}
    rates = {
        ALPHABET[letter]: int(a) / int(n)
        for letter, a, n in zip(letters, absorbed, cases, strict=True)
        if n
    }
    total = int(cases.sum())
    return {
        "rate": int(absorbed.sum()) / total,
        "per_letter": rates,
        "probe_accuracy": accuracy,
        "feature_accuracy": _feature_accuracy(train, test, sae, letters, main),
        "n_cases": total,
    }


def _eligible_letters(words: WordActivations, options: AbsorptionOptions) -> list[int]:
    counts = [int(words.word[words.letter == letter].unique().numel()) for letter in range(26)]
    return [letter for letter, count in enumerate(counts) if count >= options.min_words]


def _split(
    words: WordActivations, letters: list[int], options: AbsorptionOptions
) -> tuple[WordActivations, WordActivations]:
    """Training and test rows of the eligible letters; no word is in both."""
    generator = torch.Generator().manual_seed(options.seed)
    held_out = []
    for letter in letters:
        own = words.word[words.letter == letter].unique().cpu()
        n_test = max(1, round(options.test_share * own.numel()))
        held_out.append(own[torch.randperm(own.numel(), generator=generator)[:n_test]])
    is_test = torch.isin(words.word, torch.cat(held_out).to(words.word.device))
    is_eligible = torch.isin(words.letter, torch.tensor(letters, device=words.letter.device))

    def rows(mask: Tensor) -> WordActivations:
        return WordActivations(words.x[mask], words.word[mask], words.letter[mask])

    return rows(is_eligible & ~is_test), rows(is_test)


def _one_hot(letter: Tensor, letters: list[int]) -> Tensor:
    """Bool ``[n, len(letters)]``."""
    return letter[:, None] == torch.tensor(letters, device=letter.device)


def _main_features(
    train: WordActivations, sae: SparseCoder, letters: list[int], options: AbsorptionOptions
) -> list[Tensor]:
    """The features that stand for each letter, by k-sparse probing of the codes.

    Candidates are ranked by their correlation with the letter; as long as one more raises the F1
    of a probe on the leading ones, the letter's feature is taken to be split among them.
    """
    labels = _one_hot(train.letter, letters)
    ranked = most_correlated(train.x, sae, labels, options.max_main)
    kept, column = ranked.unique(return_inverse=True)
    z = codes_on_host(train.x, sae, kept)
    labels, column = labels.cpu(), column.cpu()
    main = []
    for index in range(len(letters)):
        candidates, label = column[index], labels[:, index : index + 1]
        best, count = _sparse_f1(z[:, candidates[:1]], label), 1
        while count < candidates.numel():
            f1 = _sparse_f1(z[:, candidates[: count + 1]], label)
            if f1 < best + options.split_gain:
                break
            best, count = f1, count + 1
        main.append(ranked[index, :count])
    return main


def _sparse_f1(z: Tensor, label: Tensor) -> float:
    """F1 on the training rows of a logistic probe on a few features ``z [n, k]``."""
    return float(f1_score(fit_probes(z, label, _SPARSE_ITERATIONS).logits(z) > 0, label))


def _feature_accuracy(
    train: WordActivations,
    test: WordActivations,
    sae: SparseCoder,
    letters: list[int],
    main: list[Tensor],
) -> float:
    """Balanced accuracy on unseen words of a probe on each letter's main features; the mean."""
    kept, column = torch.cat(main).unique(return_inverse=True)
    seen, unseen = (codes_on_host(words.x, sae, kept) for words in (train, test))
    labels, wanted = (_one_hot(words.letter, letters).cpu() for words in (train, test))
    scores = []
    for index, own in enumerate(column.cpu().split([features.numel() for features in main])):
        probe = fit_probes(seen[:, own], labels[:, index : index + 1], _SPARSE_ITERATIONS)
        found = probe.logits(unseen[:, own]) > 0
        scores.append(float(balanced_accuracy(found, wanted[:, index : index + 1])))
    return sum(scores) / len(scores)


def _count_absorbed(
    test: WordActivations,
    sae: SparseCoder,
    probes: Probes,
    main: list[Tensor],
    letters: list[int],
    options: AbsorptionOptions,
) -> tuple[Tensor, Tensor]:
    """Absorbed and all test cases by letter, int64 ``[letters]`` each.

    A case is a row that its own letter's probe recognises. Projections are taken from the
    decoder's bias, the point that active features add to.
    """
    labels = _one_hot(test.letter, letters)
    origin = sae.decode(test.x.new_zeros(1, sae.W_dec.shape[0])).float()
    projection = (test.x - origin) @ probes.direction
    is_case = labels & (probes.logits(test.x) > 0) & (projection > 0)
    on_probe = sae.W_dec.float() @ probes.direction  # [d_sae, letters]
    norms = sae.W_dec.float().norm(dim=1)[:, None] * probes.direction.norm(dim=0)
    on_probe = torch.where(on_probe > options.min_cosine * norms, on_probe, 0.0)
    absorbed = is_case.new_zeros(is_case.shape)
    for rows, z in chunks(test.x, sae):
        for index, features in enumerate(main):
            at = is_case[rows, index].nonzero().flatten()
            silent = (z[at][:, features] == 0).all(dim=1)
            strongest = (z[at] * on_probe[:, index]).argmax(dim=1, keepdim=True)
            # Only decode knows the unit of the codes, so it says what that feature adds.
            alone = torch.zeros_like(z[at]).scatter(1, strongest, z[at].gather(1, strongest))
            carried = (sae.decode(alone).float() - origin) @ probes.direction[:, index]
            aligned = on_probe[strongest[:, 0], index] > 0
            enough = carried >= options.min_share * projection[rows, index][at]
            absorbed[rows, index][at] = silent & aligned & enough
    return absorbed.sum(dim=0), is_case.sum(dim=0)
