"""Patching a language model that somebody else loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from spalf.errors import UserError
from spalf.models import huggingface, transformer_lens
from spalf.models.interface import Edit, SiteModel, in_float32
from spalf.models.sites import FAMILIES


def patched_site(model: Any, hook_point: str, patch: Edit) -> AbstractContextManager[None]:
    """While it lasts, every forward pass of ``model`` has a site's value replaced.

    Unlike `load_model`, which freezes what it loads, this leaves the model as it is: its mode,
    which parameters want gradients, and hooks of others.

    Args:
        model: what `load_model` gave, a Hugging Face causal language model of one of the
            `FAMILIES`, or any model of TransformerLens (``TransformerBridge``,
            ``HookedTransformer``).
        hook_point: TransformerLens name of the site.
        patch: maps the site's float32 ``[n_seq, seq_len, d_model]`` to its replacement, which is
            cast to the model's dtype. Gradients flow through it.

    Raises:
        UserError: the model is of no known kind, or has no such site.
    """
    if isinstance(model, SiteModel):
        if hook_point != model.hook_point:
            raise UserError("hook_point", hook_point, f"the model is open at {model.hook_point}")
        return model.patched(patch)
    edit = in_float32(patch)
    if hasattr(model, "hook_dict"):
        return transformer_lens.edited(model, hook_point, edit)
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family in FAMILIES:
        return huggingface.edited(model, hook_point, edit)
    known = ", ".join(FAMILIES)
    remedy = f"must be a model of TransformerLens or a Hugging Face model of {known}"
    raise UserError("model", family, remedy)
