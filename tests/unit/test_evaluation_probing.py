from __future__ import annotations

import keyword
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spalf.data import SequenceStream
from spalf.evaluation import (
    TASKS,
    ProbingMeasurement,
    TokenLabels,
    encoder,
    label_tokens,
    probe_tasks,
)
from spalf.evaluation.probing import held_out
from spalf.evaluation.source_labels import label_characters
from spalf.models import load_tokenizer

SOURCE = '''\
import os  # not "a string"
def f(x):
    """Is if."""
    # for
    if x and "# no":
        return f"{x if x else 'y'}"
    return """two
lines"""

y = 1
'''


def stretches(source: str, task: str) -> list[str]:
    """The stretches of ``source`` that a task is true of."""
    true = label_characters(source)[:, TASKS.index(task)]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], true, [False]]).astype(int)))
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [source[start:end] for start, end in pairs]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (
            "in_string",
            ['"""Is if."""', '"# no"', "f\"{x if x else 'y'}\"", '"""two\nlines"""'],
        ),
        ("in_comment", ['# not "a string"', "# for"]),
        ("keyword", ["import", "def", "if", "and", "return", "return"]),
        ("indent_2", ["        return f\"{x if x else 'y'}\"\n"]),
        ("indent_0", [SOURCE[: SOURCE.index('    """Is')], "y = 1\n"]),
    ],
)
def test_labels_of_a_small_file(task: str, expected: list[str]) -> None:
    assert stretches(SOURCE, task) == expected


def test_every_character_has_one_depth() -> None:
    labels = label_characters(SOURCE)
    assert (labels[:, [TASKS.index(t) for t in TASKS if t.startswith("indent")]].sum(1) == 1).all()


@pytest.mark.parametrize(
    "source",
    ["x = 1", "if x:\n\ty\n", "if x:\r\n    y\r\n", "x = '''a\n\nb'''", "\f\nx = 1\n", "é = 'ü'\n"],
    ids=["no last newline", "tabs", "two-byte line ends", "empty line", "form feed", "not ASCII"],
)
def test_odd_files_are_labelled_to_their_end(source: str) -> None:
    assert label_characters(source).shape == (len(source), len(TASKS))


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A tokenizer of one token a character, 1 above its code; 0 is left to separate documents."""
    return [ord(c) + 1 for c in text], [(i, i + 1) for i in range(len(text))]


def text_of(ids: list[int]) -> str:
    return "".join(chr(i - 1) for i in ids)


def pack(*documents: str) -> np.ndarray:
    return np.array([token for text in documents for token in (0, *characters(text)[0])])


def test_documents_are_labelled_apart_and_separators_are_not() -> None:
    labels = label_tokens(pack("x = 'a'", "# b\n"), [0], text_of, characters)
    assert labels.document.tolist() == [-1, *[0] * 7, -1, *[1] * 4]
    in_string = labels.answers[:, TASKS.index("in_string")]
    assert text_of((pack("x = 'a'", "# b\n")[in_string]).tolist()) == "'a'"


def test_what_is_no_python_or_tokenised_otherwise_has_no_labels() -> None:
    tokens = pack("It is not code.", "x = 1", "y")

    def other(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans = characters(text)
        return ([*ids, 5], [*spans, (0, 1)]) if text == "y" else (ids, spans)

    labels = label_tokens(tokens, [0], text_of, other)
    assert text_of(tokens[labels.document >= 0].tolist()) == "x = 1"
    assert not labels.answers[labels.document < 0].any()


def test_documents_that_nobody_asks_for_are_passed_over() -> None:
    tokens = pack("a", "b")
    labels = label_tokens(tokens, [0], text_of, characters, tokens == ord("b") + 1)
    assert labels.document.tolist() == [-1, -1, -1, 1]


def test_tokens_of_a_real_tokenizer_get_the_labels_of_what_they_spell() -> None:
    tokenizer = load_tokenizer("spalf/demo-2l")
    encode = encoder(tokenizer)
    assert encode is not None
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    ids, spans = encode(text)
    labels = label_tokens(np.array(ids), [0], tokenizer.decode, encode)
    assert (labels.document == 0).all()
    answers = {task: labels.answers[:, i] for i, task in enumerate(TASKS)}
    for (start, end), string, comment, word in zip(
        spans, *(answers[name] for name in TASKS[:3]), strict=True
    ):
        spelled = text[start:end].strip()
        assert not (string and comment)
        if spelled in keyword.kwlist and not (string or comment) and word is not None:
            # Part of a longer name otherwise, such as `is` in `this`.
            whole = not (text[end : end + 1].isidentifier() or text[end : end + 1].isdigit())
            before = text[start : start + len(text[start:end]) - len(spelled)] or text[start - 1]
            whole = whole and not before[-1].isidentifier()
            assert word == whole, text[start - 20 : end + 20]
    assert 0.2 < answers["in_string"].mean() < 0.8
    assert answers["in_comment"].any() and answers["indent_3_or_more"].any()


D_MODEL, N = 24, 3000


class Planted:
    """Feature j reads direction j of the activations; the codes of feature 2 are never used."""

    def __init__(self, d_sae: int = D_MODEL) -> None:
        self.W_dec = torch.eye(D_MODEL)[:d_sae]

    def encode(self, x: Tensor) -> Tensor:
        pre = x @ self.W_dec.T
        return pre * (pre > 0.5)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """Two tasks: feature 3 is one's answer, feature 5 is silent where the other's is yes."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.rand(N, 2, generator=generator) < torch.tensor([0.2, 0.5])
    x = 0.1 * torch.randn(N, D_MODEL, generator=generator)
    x[:, 3] += answers[:, 0].float()
    x[:, 5] += (~answers[:, 1]).float()
    return x, answers, torch.arange(N) % 3 == 2


def test_planted_features_are_found_and_answer_for_unseen_tokens() -> None:
    x, answers, is_test = planted()
    found = probe_tasks(x, answers, is_test, Planted(), tasks=("one", "two"))
    assert found["tasks"]["one"]["features"][0] == 3
    assert found["tasks"]["two"]["features"][0] == 5
    for task in found["tasks"].values():
        for probe in ("all", "k1", "k5"):
            assert task[probe]["accuracy"] > 0.99
            assert task[probe]["f1"] > 0.98
    assert (found["n_train"], found["n_test"]) == (2000, 1000)
    assert found["tasks"]["one"]["positive"] == pytest.approx(0.2, abs=0.03)


def test_features_that_know_nothing_are_at_chance() -> None:
    x, answers, is_test = planted()
    x[:, 3] = x[:, 5]  # the activations know as little
    found = probe_tasks(x, answers[:, :1], is_test, Planted(), tasks=("one",))["tasks"]["one"]
    for probe in ("all", "k1", "k5"):
        assert found[probe]["accuracy"] == pytest.approx(0.5, abs=0.06)


def test_a_dictionary_without_the_features_is_worse_than_the_activations() -> None:
    x, answers, is_test = planted()
    found = probe_tasks(x, answers[:, :1], is_test, Planted(d_sae=3), tasks=("one",))
    one = found["tasks"]["one"]
    assert one["all"]["accuracy"] > 0.99
    assert one["k5"]["accuracy"] < 0.6
    assert len(one["features"]) == 3


def test_the_end_of_every_document_is_held_out() -> None:
    at = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    document = at // 300
    is_test = held_out(document, at, 1 / 3)
    assert torch.equal(is_test, at % 300 >= 200)


def test_tasks_without_both_answers_are_left_out_or_skipped() -> None:
    x, answers, is_test = planted()
    answers[:, 1] = False
    found = probe_tasks(x, answers, is_test, Planted(), tasks=("one", "two"))
    assert set(found["tasks"]) == {"one"}
    none = probe_tasks(x, answers[:, 1:], is_test, Planted(), tasks=("two",))
    assert set(none) == {"skipped"} and "either answer" in none["skipped"]


class Model:
    """The activation of a token is one-hot."""

    device = torch.device("cpu")

    def activations(self, tokens: Tensor) -> Tensor:
        return torch.eye(D_MODEL)[tokens % D_MODEL]

    def patched_logits(self, tokens: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
        raise AssertionError("probing runs the model only up to the site")


def measurement(documents: int = 12) -> tuple[ProbingMeasurement, SequenceStream]:
    """The answer to the first task is whether a token is odd."""
    tokens = np.random.default_rng(0).integers(0, D_MODEL, (60, 20))
    answers = np.zeros((1200, len(TASKS)), dtype=bool)
    answers[:, 0] = tokens.flatten() % 2 == 1
    document = (np.arange(1200) // (1200 // documents)).astype(np.int32)
    document[::7] = -1
    stream = SequenceStream(tokens)
    return ProbingMeasurement(Model(), Planted(), stream, TokenLabels(answers, document)), stream


def test_labels_follow_the_tokens_in_the_order_they_are_read() -> None:
    probing, stream = measurement()
    for start in range(0, 40, 8):
        probing.add(stream.sequences(start, 8, seed=0))
    found = probing.result()
    assert set(found["tasks"]) == {"in_string"}
    assert found["tasks"]["in_string"]["all"]["accuracy"] == 1
    assert found["n_train"] + found["n_test"] == pytest.approx(800 * 6 / 7, abs=40)
    assert found["documents"] == 12


@pytest.mark.parametrize("left_after", [0, 1, 3])
def test_i10_probing_can_be_left_and_taken_up(left_after: int) -> None:
    (straight, stream), (first, _), (second, _) = measurement(), measurement(), measurement()
    batches = [stream.sequences(start, 8, seed=0) for start in range(0, 32, 8)]
    for batch in batches:
        straight.add(batch)
    for batch in batches[:left_after]:
        first.add(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[left_after:]:
        second.add(batch)
    assert second.result() == straight.result()


def test_text_without_python_is_skipped() -> None:
    probing, stream = measurement()
    probing._labels.document[:] = -1
    probing.add(stream.sequences(0, 8, seed=0))
    assert probing.result() == {"skipped": "no document of the evaluation text is Python source"}


def test_a_tokenizer_that_knows_no_characters_is_not_used() -> None:
    assert encoder(object()) is None
