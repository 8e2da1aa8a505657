"""A language model's pass replayed from a CUDA graph gives the activations it would give itself."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spalf.models import load_model, replayed
from spalf.models.interface import LanguageModel
from spalf.models.replay import MOST_SHAPES, Pass, Replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama", "gemma2"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    if request.param != "gpt2":
        sizes |= {"intermediate_size": 128}
    if request.param in ("llama", "gemma2"):
        sizes |= {"num_key_value_heads": 2}
    if request.param == "gemma2":
        sizes |= {"head_dim": 16}
    config = AutoConfig.for_model(request.param, **sizes)
    path: Path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return load_model(
        str(path),
        "blocks.1.hook_resid_post",
        backend="huggingface",
        dtype="bfloat16",
        device="cuda",
    )


def tokens(seed: int, shape: tuple[int, int] = (8, 64)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 211, shape, generator=generator)


def family(model: LanguageModel) -> str:
    """Of these, Gemma 2 alone cannot be recorded with this version of transformers."""
    return str(model._model.config.model_type)  # type: ignore[attr-defined]


def is_recorded(run: Replayed) -> list[bool]:
    """Shape by shape, whether there is a graph."""
    return [graph is not None for graph in run._recorded.values()]


def wait_for_it(module: object, inputs: object, output: Tensor) -> None:
    """A forward hook that makes the host wait for the GPU."""
    output.sum().item()


@pytest.mark.parametrize("name", ["activations", "logits"])
def test_bits_are_those_of_the_model(model: LanguageModel, name: str) -> None:
    plain: Pass = getattr(model, name)
    run = replayed(model, plain)
    assert isinstance(run, Replayed)
    for seed in range(4):
        for shape in ((8, 64), (3, 64), (8, 17)):
            given = tokens(seed, shape)
            assert torch.equal(run(given), plain(given))
    assert is_recorded(run) == [family(model) != "gemma2"] * 3


def test_what_was_returned_stays(model: LanguageModel) -> None:
    run = replayed(model, model.activations)
    results = [run(tokens(seed)) for seed in range(5)]
    for seed, result in enumerate(results):
        assert torch.equal(result, model.activations(tokens(seed)))


def test_two_threads_with_a_stream_each(model: LanguageModel) -> None:
    run = replayed(model, model.activations)
    expected = [model.activations(tokens(seed)) for seed in range(20)]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(first, 20, 2):
                if not torch.equal(run(tokens(seed)), expected[seed]):
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_shapes_are_not_all_recorded(model: LanguageModel) -> None:
    run = replayed(model, model.activations)
    assert isinstance(run, Replayed)
    for length in range(8, 8 + 2 * MOST_SHAPES):
        given = tokens(length, (2, length))
        assert torch.equal(run(given), model.activations(given))
    assert len(run._recorded) == MOST_SHAPES


def test_a_model_that_waits_for_the_device_is_run_itself(model: LanguageModel) -> None:
    """It cannot be recorded, and the GPU can be used and recorded on afterwards."""
    inner = model._model  # type: ignore[attr-defined]
    hook = inner.get_input_embeddings().register_forward_hook(wait_for_it)
    try:
        run = replayed(model, model.activations)
        assert isinstance(run, Replayed)
        for seed in range(3):
            assert torch.equal(run(tokens(seed)), model.activations(tokens(seed)))
        assert list(run._recorded.values()) == [None]
    finally:
        hook.remove()
    again = replayed(model, model.activations)
    for seed in range(3):
        assert torch.equal(again(tokens(seed)), model.activations(tokens(seed)))
    assert isinstance(again, Replayed)
    assert is_recorded(again) == [family(model) != "gemma2"]
