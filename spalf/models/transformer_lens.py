"""Backend over TransformerLens's bridge: any architecture it knows, with raw weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from spalf.errors import UserError
from spalf.models.interface import Edit, SiteModel
from spalf.models.sites import no_such_site, unknown_hook_point


class TransformerLensModel(SiteModel):
    """A Hugging Face model behind a ``TransformerBridge``; no weights are folded or centred.

    Args:
        model: the loaded Hugging Face model, on its device, with eager attention.
        tokenizer: its tokenizer, which the bridge asks for.
        path: local directory of its files.
        name: as the user wrote it.
        hook_point: any hook of the bridge whose value is ``[n_seq, seq_len, d_model]``.

    Raises:
        UserError: the architecture or the hook point is unknown, or its value has another shape.
    """

    def __init__(self, model: Any, tokenizer: Any, path: str, name: str, hook_point: str) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.name, self.hook_point, self.device = name, hook_point, model.device
        hf_config = model.config
        try:
            bridge = TransformerBridge.boot_transformers(
                path, hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
            )
        except ValueError as error:
            remedy = f"TransformerLens cannot load this model: {str(error).splitlines()[0][:200]}"
            raise UserError("model_name", name, remedy) from None
        self._model: Any = bridge.requires_grad_(False).eval()
        if hook_point not in self._model.hook_dict:
            raise unknown_hook_point(hook_point, hf_config)
        self._hook = self._model.hook_dict[hook_point]
        self.d_model, self.n_layers = bridge.cfg.d_model, bridge.cfg.n_layers
        self.d_vocab = self.unembedding().shape[1]
        self._require_residual_width(hf_config)

    def unembedding(self) -> Tensor:
        """See `LanguageModel.unembedding`."""
        weight: Tensor = self._model.original_model.get_output_embeddings().weight
        return weight.T.float()

    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(tokens, return_type="logits")
        return logits

    @contextmanager
    def _hooked(self, edit: Edit) -> Iterator[None]:
        # Not through `edited`: with many layers, looking a name up costs as much as a forward pass.
        self._hook.add_hook(_as_hook(edit))
        try:
            yield
        finally:
            self._hook.remove_hooks("fwd")

    def _require_residual_width(self, hf_config: Any) -> None:
        probe = torch.zeros((1, 2), dtype=torch.int64)
        if self.activations(probe).shape != (1, 2, self.d_model):
            raise unknown_hook_point(self.hook_point, hf_config)


def edited(model: Any, hook_point: str, edit: Edit) -> AbstractContextManager[None]:
    """While it lasts, ``edit`` replaces the value at a hook of a TransformerLens model.

    Args:
        model: a ``TransformerBridge`` or a ``HookedTransformer``; hooks that are on it stay.
        hook_point: name of the hook.
        edit: maps the value, in the model's own dtype, to its replacement.

    Raises:
        UserError: the model has no such hook.
    """
    if hook_point not in model.hook_dict:
        raise no_such_site(hook_point, model.cfg.n_layers)

    hooked: AbstractContextManager[None] = model.hooks(fwd_hooks=[(hook_point, _as_hook(edit))])
    return hooked


def _as_hook(edit: Edit) -> Callable[..., Tensor]:
    """``edit`` with the argument that TransformerLens hands to a hook besides the value."""

    def replace(value: Tensor, hook: Any) -> Tensor:
        return edit(value)

    return replace
