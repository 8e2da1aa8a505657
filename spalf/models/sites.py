"""Sites of a model: TransformerLens hook names, and the Hugging Face modules they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from spalf.errors import UserError

KINDS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")

_HOOK_NAME = re.compile(rf"blocks\.(\d+)\.({'|'.join(KINDS)})")


@dataclass(frozen=True)
class Family:
    """Where one family of Hugging Face models keeps its sites.

    Attributes:
        blocks: path of the list of transformer blocks.
        attn_out: module within a block whose output attention adds to the residual stream.
        mlp_out: the same for the MLP.
        attention: ``attn_implementation``.
    """

    blocks: str
    attn_out: str
    mlp_out: str
    attention: str = "sdpa"


_LLAMA = Family("model.layers", "self_attn", "mlp")

FAMILIES = MappingProxyType(
    {
        "gpt2": Family("transformer.h", "attn", "mlp"),
        "gpt_neox": Family("gpt_neox.layers", "attention", "mlp"),
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        # Gemma 2 normalises what a sub-layer adds, and sdpa cannot cap its attention scores.
        "gemma2": Family(
            "model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "eager"
        ),
    }
)
"""Families the Hugging Face backend knows, by ``config.model_type``."""


@dataclass(frozen=True)
class Site:
    """A parsed hook name.

    Attributes:
        layer: index of the transformer block.
        kind: one of `KINDS`.
    """

    layer: int
    kind: str


def hook_points(model_config: Any) -> list[str]:
    """The hook names that every backend knows for a model with this Hugging Face config."""
    layers = range(model_config.get_text_config().num_hidden_layers)
    return [f"blocks.{layer}.{kind}" for layer in layers for kind in KINDS]


def layer_and_kind(hook_point: str) -> tuple[int, str] | None:
    """Layer and kind of site of a hook name such as ``blocks.6.hook_resid_post``, else ``None``."""
    match = _HOOK_NAME.fullmatch(hook_point)
    return (int(match[1]), match[2]) if match else None


def parse_hook_point(hook_point: str, model_config: Any) -> Site:
    """The site that a hook name stands for.

    Raises:
        UserError: it is not one of `hook_points`.
    """
    found = layer_and_kind(hook_point)
    if found is None or hook_point not in hook_points(model_config):
        raise unknown_hook_point(hook_point, model_config)
    return Site(*found)


def unknown_hook_point(hook_point: str, model_config: Any) -> UserError:
    """The error for a hook name that a model with this Hugging Face config does not have."""
    return no_such_site(hook_point, model_config.get_text_config().num_hidden_layers)


def no_such_site(hook_point: str, n_layers: int) -> UserError:
    """The error for a hook name that a model of ``n_layers`` blocks does not have."""
    layers = f"L = 0 to {n_layers - 1}" if n_layers > 1 else "L = 0"
    remedy = f"no such site; this model has {', '.join(f'blocks.L.{k}' for k in KINDS)}, {layers}"
    return UserError("hook_point", hook_point, remedy)
