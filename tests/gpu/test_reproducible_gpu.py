"""Gradients through a language model are the same bits each time, or Phase 2 could not resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spalf.models import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq_len", [64, 128, 256, 1024])
def test_gradients_through_long_sequences_are_the_same_bits(
    tmp_path: Path, dtype: str, seq_len: int
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "hidden_size": 256, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 512}
    config = AutoConfig.for_model("gpt_neox", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(
        str(tmp_path),
        "blocks.0.hook_resid_post",
        backend="huggingface",
        dtype=dtype,
        device="cuda",
    )
    tokens = torch.randint(0, 211, (8192 // seq_len, seq_len))

    def gradient() -> Tensor:
        shift = torch.zeros(256, device="cuda", requires_grad=True)
        logits = model.patched_logits(tokens, lambda x: x + shift)
        (found,) = torch.autograd.grad(logits.log_softmax(-1)[..., 0].mean(), shift)
        return found

    first = gradient()
    assert first.any()
    assert all(torch.equal(gradient(), first) for _ in range(8))
