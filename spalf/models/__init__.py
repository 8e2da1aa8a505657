"""Language models: loading, reading activations at a site, and patching it."""

from spalf.models.interface import LanguageModel
from spalf.models.load import identifying_files, load_model, load_tokenizer, resolve_model
from spalf.models.patch import patched_site
from spalf.models.replay import replayed
from spalf.models.sites import hook_points

__all__ = [
    "LanguageModel",
    "hook_points",
    "identifying_files",
    "load_model",
    "load_tokenizer",
    "patched_site",
    "replayed",
    "resolve_model",
]
