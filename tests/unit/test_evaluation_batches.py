"""How many sequences an evaluation takes at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spalf.steps.evaluate import SEQUENCES_PER_BATCH, _Subject


def subject(device: str, d_vocab: int, d_sae: int, seq_len: int = 128) -> Any:
    """What is measured, as far as the sizes go."""
    sae: Any = SimpleNamespace(coder=SimpleNamespace(d_sae=d_sae))
    model: Any = SimpleNamespace(device=torch.device(device), d_vocab=d_vocab)
    stream, rest = SimpleNamespace(seq_len=seq_len), SimpleNamespace()
    made: Any = _Subject
    return made(rest, model, {"phase1": sae, "phase2": sae}, stream, rest)


@pytest.mark.parametrize(
    "d_vocab, d_sae, expected", [(4096, 8192, 32), (8192, 4096, 32), (50_257, 131_072, 8)]
)
def test_a_gpu_gets_as_many_as_fill_it(d_vocab: int, d_sae: int, expected: int) -> None:
    """Logits and codes of a batch stay below 2²⁵ numbers, unless eight sequences have more."""
    assert subject("cuda", d_vocab, d_sae).sequences_per_batch == expected
    assert subject("cpu", d_vocab, d_sae).sequences_per_batch == SEQUENCES_PER_BATCH == 8
