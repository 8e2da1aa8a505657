"""k-sparse probing: how much of a fact about a token can be read from k features.

After arXiv 2305.01610 and SAEBench (arXiv 2503.09532), on facts that the text itself tells: for
Python source those of `spalf.evaluation.source_labels`. A probe that sees all of the activation
says how much there is to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spalf.data import SequenceStream
from spalf.evaluation.probes import (
    balanced_accuracy,
    codes_on_host,
    f1_score,
    fit_probes,
    most_correlated,
)
from spalf.evaluation.protocols import PatchableModel, SparseCoder
from spalf.evaluation.source_labels import TASKS, TokenLabels

PROBED_TOKENS = 16_384
"""Tokens that are probed; two thirds of them train the probes."""


@dataclass(frozen=True)
class ProbingOptions:
    """Settings of the measurement.

    Attributes:
        ks: how many features a probe may see.
        test_share: share of each document, its end, that probes are tested on and not trained on.
        min_positive: tokens of either answer that a task needs on both sides.
        iterations: of the optimiser, for probes of a few features.
    """

    ks: tuple[int, ...] = (1, 5)
    test_share: float = 1 / 3
    min_positive: int = 20
    iterations: int = 30


class ProbingMeasurement:
    """Gathers activations batch by batch; can be left and taken up in between.

    Args:
        model: the language model; runs only up to the site.
        sae: the trained SAE.
        stream: what the batches come from, in the order of ``sequences(…, seed=0)``.
        labels: of its tokens.
        options: settings.
    """

    def __init__(
        self,
        model: PatchableModel,
        sae: SparseCoder,
        stream: SequenceStream,
        labels: TokenLabels,
        options: ProbingOptions | None = None,
    ) -> None:
        places = np.arange(stream.n_sequences * stream.seq_len)
        # In the order of the tokens, because that depends on the number of sequences alone.
        self._places = SequenceStream(places.reshape(stream.n_sequences, stream.seq_len))
        self._model, self._sae, self._labels = model, sae, labels
        self._options = options or ProbingOptions()
        self._taken = 0
        self._x: list[Tensor] = []
        self._at: list[Tensor] = []

    def add(self, sequences: Tensor) -> None:
        """Take in the next batch of tokens ``[n_seq, seq_len]``."""
        count = sequences.shape[0]
        at = self._places.sequences(self._taken, count, seed=0).flatten()
        self._taken += count
        labelled = torch.from_numpy(self._labels.document[at.numpy()] >= 0)
        if not labelled.any():
            return
        x = self._model.activations(sequences.to(self._model.device)).flatten(0, 1)
        self._x.append(x[labelled.to(x.device)].float())
        self._at.append(at[labelled])

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far."""
        state = {"taken": torch.tensor(self._taken)}
        return state | ({"x": torch.cat(self._x), "at": torch.cat(self._at)} if self._x else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; going on is then bit-identical."""
        if "taken" in state:
            self._taken = int(state["taken"])
        if "x" in state:
            self._x, self._at = [state["x"].to(self._model.device)], [state["at"].cpu()]

    def result(self) -> dict[str, Any]:
        """As `probe_tasks`, or ``skipped``: why there is no measurement."""
        if not self._x:
            return {"skipped": "no document of the evaluation text is Python source"}
        at = torch.cat(self._at)
        document = torch.from_numpy(self._labels.document[at.numpy()])
        answers = torch.from_numpy(self._labels.answers[at.numpy()])
        is_test = held_out(document, at, self._options.test_share)
        found = probe_tasks(torch.cat(self._x), answers, is_test, self._sae, options=self._options)
        return {**found, "documents": int(document.unique().numel())}


def held_out(document: Tensor, at: Tensor, share: float) -> Tensor:
    """Which rows are the end of their document, bool ``[n]``: text that no probe is trained on.

    Args:
        document: which document each row is of, int ``[n]``.
        at: where the row is, in the order of the text.
        share: of each document's rows that is held out.
    """
    is_test = torch.zeros(document.shape[0], dtype=torch.bool)
    for number in document.unique():
        rows = (document == number).nonzero().flatten()
        rows = rows[at[rows].argsort()]
        is_test[rows[rows.numel() - round(share * rows.numel()) :]] = True
    return is_test


@torch.no_grad()
def probe_tasks(
    x: Tensor,
    answers: Tensor,
    is_test: Tensor,
    sae: SparseCoder,
    *,
    tasks: Sequence[str] = TASKS,
    options: ProbingOptions | None = None,
) -> dict[str, Any]:
    """Probe a dictionary for yes-or-no facts about tokens.

    The features of a task are those whose codes are most correlated with its answer, either way,
    on the training rows. A class-balanced logistic probe of the first k of them is tested on the
    others.

    Args:
        x: activations ``[n, d_model]``.
        answers: bool ``[n, len(tasks)]``.
        is_test: which rows probes are tested on, bool ``[n]``.
        sae: the trained SAE.
        tasks: names of the columns of ``answers``.
        options: settings.

    Returns:
        ``tasks``: by name, ``positive`` (share of the tested rows), ``all`` (a probe of x itself)
        and ``k1``, ``k5`` (of so many features), each with ``accuracy`` (balanced; chance is 0.5)
        and ``f1``, and ``features``, the best first; ``n_train`` and ``n_test``. Tasks with too
        few rows of an answer are left out; if all are, only ``skipped``: why.
    """
    chosen = options or ProbingOptions()
    used = [i for i in range(len(tasks)) if _is_asked(answers[:, i], is_test, chosen)]
    if not used:
        reason = f"no task has {chosen.min_positive} tokens of either answer on both sides"
        return {"skipped": reason}
    names, answers = [tasks[i] for i in used], answers[:, used].to(x.device)
    train, test = (rows.nonzero().flatten().to(x.device) for rows in (~is_test, is_test))
    scores = {"all": _scores(x[train], x[test], answers[train], answers[test], 100)}
    best = most_correlated(x[train], sae, answers[train], max(chosen.ks), merit=torch.abs)
    kept, column = best.unique(return_inverse=True)
    z = codes_on_host(x, sae, kept)
    seen, unseen, column, asked = train.cpu(), test.cpu(), column.cpu(), answers.cpu()
    for k in chosen.ks:
        rows = []
        for task in range(len(names)):
            own, label = z[:, column[task, :k]], asked[:, task : task + 1]
            sides = (own[seen], own[unseen], label[seen], label[unseen])
            rows += _scores(*sides, chosen.iterations)
        scores[f"k{k}"] = rows
    shares = answers[test].float().mean(dim=0).tolist()
    return {
        "tasks": {
            name: {"positive": share, "features": best[i].tolist()}
            | {probe: rows[i] for probe, rows in scores.items()}
            for i, (name, share) in enumerate(zip(names, shares, strict=True))
        },
        "n_train": train.numel(),
        "n_test": test.numel(),
    }


def _is_asked(answer: Tensor, is_test: Tensor, options: ProbingOptions) -> bool:
    sides = [answer[side] == value for side in (is_test, ~is_test) for value in (True, False)]
    return min(int(side.sum()) for side in sides) >= options.min_positive


def _scores(
    seen: Tensor, unseen: Tensor, labels: Tensor, wanted: Tensor, iterations: int
) -> list[dict[str, float]]:
    """How probes fitted on ``seen`` do on ``unseen``, one entry a column of the labels."""
    found = fit_probes(seen, labels, iterations).logits(unseen) > 0
    accuracy, f1 = balanced_accuracy(found, wanted), f1_score(found, wanted)
    return [{"accuracy": a, "f1": f} for a, f in zip(accuracy.tolist(), f1.tolist(), strict=True)]
