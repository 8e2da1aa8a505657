"""Backend over plain Hugging Face models, with hooks on their modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spalf.models.interface import Edit, SiteModel
from spalf.models.sites import FAMILIES, Site, parse_hook_point

SHORT = 128
"""Sequences up to which the gradient of every attention kernel is the same bits each time. Beyond
it the memory-efficient one, which float32 gets on a GPU, adds up its gradient in any order."""


class HuggingFaceModel(SiteModel):
    """A Hugging Face causal language model of one of the `FAMILIES`.

    Args:
        model: the loaded model, on its device.
        name: as the user wrote it.
        hook_point: the site's name.
        site: the same, parsed.
    """

    def __init__(self, model: Any, name: str, hook_point: str, site: Site) -> None:
        self.name, self.hook_point = name, hook_point
        self._model = model.requires_grad_(False).eval()
        self._site = site
        self.device = model.device
        self.d_model = model.config.hidden_size
        self.n_layers = model.config.num_hidden_layers
        self.d_vocab = model.get_output_embeddings().weight.shape[0]

    def unembedding(self) -> Tensor:
        """See `LanguageModel.unembedding`."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight.T.float()

    def logits(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        with self._reproducible(tokens):
            return super().logits(tokens)

    def patched_logits(self, tokens: Tensor, patch: Edit) -> Tensor:
        """See `LanguageModel.patched_logits`."""
        with self._reproducible(tokens):
            return super().patched_logits(tokens, patch)

    def _reproducible(self, tokens: Tensor) -> AbstractContextManager[Any]:
        """Attention with a gradient that does not change from one time to the next."""
        exposed = self.device.type == "cuda" and self._model.dtype == torch.float32
        if exposed and tokens.shape[1] > SHORT:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits

    def _hooked(self, edit: Edit) -> AbstractContextManager[None]:
        return _edited_site(self._model, self._site, edit)


def edited(model: Any, hook_point: str, edit: Edit) -> AbstractContextManager[None]:
    """While it lasts, ``edit`` replaces the value at a site of a Hugging Face model.

    The model itself is not changed; hooks that are on it stay.

    Args:
        model: a causal language model of one of the `FAMILIES`.
        hook_point: TransformerLens name of the site.
        edit: maps the site's value, in the model's own dtype, to its replacement.

    Raises:
        UserError: the model has no such site.
    """
    return _edited_site(model, parse_hook_point(hook_point, model.config), edit)


@contextmanager
def _edited_site(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (edit(args[0]), *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # attention also returns its pattern
            return (edit(output[0]), *output[1:])
        return edit(output)

    module, at_input = _locate(model, site)
    if at_input:
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _locate(model: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """The module that a site belongs to, and whether the site is its input."""
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr,index]
    block = model.get_submodule(f"{family.blocks}.{site.layer}")
    if site.kind == "hook_attn_out":
        return block.get_submodule(family.attn_out), False
    if site.kind == "hook_mlp_out":
        return block.get_submodule(family.mlp_out), False
    return block, site.kind == "hook_resid_pre"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name from the configuration."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
