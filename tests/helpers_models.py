"""Tiny randomly initialised language models of every mapped family, in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 96
D_MODEL = 32
N_LAYERS = 2
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "gemma2")


def save_tiny_model(family: str, directory: Path, seed: int = 0) -> Path:
    """Save a model of two layers and width 32, with a tokenizer, and return its directory."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    logging.enable_progress_bar()
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_config(family: str) -> Any:
    """The configuration of a tiny model; sliding windows are shorter than the tests' sequences."""
    import transformers

    common = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
        return transformers.GPT2Config(**common, **sizes)
    common |= {
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**common)
    common["num_key_value_heads"] = 2
    if family == "gemma2":
        gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
        return transformers.Gemma2Config(**common, **gemma)
    if family == "mistral":
        return transformers.MistralConfig(**common, sliding_window=8)
    names = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return names[family](**common)


def tiny_tokenizer(bos: str = "<|endoftext|>", eos: str = "<|endoftext|>") -> Any:
    """One token per lower-case letter, digit, space and newline; unknown characters are dropped."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([bos, eos]))
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 \n"
    vocab = {token: i for i, token in enumerate([*special, "<unk>", *characters])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos)
