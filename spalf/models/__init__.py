"""Language models: loading, reading activations at a site, and patching it."""

from spalf.models.interface import LanguageModel
from spalf.models.load import load_model, load_tokenizer, resolve_model
from spalf.models.sites import hook_points

__all__ = ["LanguageModel", "hook_points", "load_model", "load_tokenizer", "resolve_model"]
