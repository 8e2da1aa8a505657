"""Finding and loading a language model and its tokenizer. Heavy libraries load on first use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spalf.errors import UserError
from spalf.hub import hub_reachable, refusal, snapshot_of
from spalf.models.huggingface import HuggingFaceModel, torch_dtype
from spalf.models.interface import LanguageModel
from spalf.models.sites import FAMILIES, hook_points, parse_hook_point, unknown_hook_point
from spalf.models.transformer_lens import TransformerLensModel

BUNDLED_PREFIX = "spalf/"
_BUNDLED = Path(__file__).parent.parent / "bundled"
_TOKENIZER_FILE = re.compile(r"tokenizer|vocab|merges|spiece|sentencepiece|.*\.(model|tiktoken)$")
_OTHER_FILES = {"config.json", "special_tokens_map.json", "added_tokens.json"}
_OFFLINE = "with no network, give a local directory or a bundled model such as spalf/demo-2l"


def resolve_model(model_name: str) -> str:
    """Where a model is: a local directory, or a hub id unchanged.

    ``spalf/<name>`` is a model bundled with the package.

    Raises:
        UserError: a bundled model or a local directory that does not exist or is incomplete.
    """
    if model_name.startswith(BUNDLED_PREFIX):
        path = _BUNDLED / model_name.removeprefix(BUNDLED_PREFIX)
        if not (path / "config.json").is_file():
            known = sorted(config.parent.name for config in _BUNDLED.glob("*/config.json"))
            known_names = ", ".join(f"{BUNDLED_PREFIX}{name}" for name in known)
            remedy = f"no such bundled model; there are {known_names}"
            raise UserError("model_name", model_name, remedy)
        return str(path)
    path = Path(model_name).expanduser()
    if path.is_dir():
        _require_complete(model_name, path)
        return str(path)
    if model_name.count("/") > 1 or model_name.startswith(("/", ".", "~")) or path.exists():
        remedy = "no such directory; give a Hugging Face model directory or a hub id"
        raise UserError("model_name", model_name, remedy)
    return model_name


def _require_complete(model_name: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        remedy = "has no config.json; give a directory in Hugging Face format"
        raise UserError("model_name", model_name, remedy)
    if not any(path.glob("*.safetensors")):
        remedy = "has no *.safetensors weights; save the model with safetensors"
        raise UserError("model_name", model_name, remedy)


def identifying_files(directory: Path) -> list[Path]:
    """The files of a model's directory that make it this model and no other, by name.

    Configuration, weights, tokenizer, and the code that may come with it.
    """
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and (
            path.name in _OTHER_FILES
            or path.suffix in {".safetensors", ".py"}
            or _TOKENIZER_FILE.match(path.name)
        )
    ]


def load_tokenizer(
    model_name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The Hugging Face tokenizer of a model.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    path = resolve_model(model_name)
    files = {found.name for found in Path(path).glob("*")} if Path(path).is_dir() else None
    if files is not None and not any(_TOKENIZER_FILE.match(name) for name in files):
        # The library would make one up.
        remedy = "its tokenizer cannot be read: there are no tokenizer files in it"
        raise UserError("model_name", model_name, remedy)
    with _as_user_error(model_name, path, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            path, **_source_options(path, revision, trust_remote_code)
        )


def _source_options(path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What every ``from_pretrained`` gets; with no hub in reach, its cache may still have it."""
    offline = not Path(path).is_dir() and not hub_reachable()
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return {**options, "local_files_only": True} if offline else options


def load_model(
    model_name: str,
    hook_point: str,
    *,
    backend: str = "auto",
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a frozen language model for one site.

    Args:
        model_name: a bundled model, a local directory or a hub id (`resolve_model`).
        hook_point: TransformerLens name of the site.
        backend: ``huggingface`` for the families it maps; ``transformer_lens`` for all that
            TransformerLens knows; ``auto`` takes the first where it can.
        revision: of a hub model.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the model computes in.
        device: where it runs.
        trust_remote_code: allow code that comes with the model.

    Raises:
        UserError: the model cannot be found, read or fetched; the site or backend does not fit it.
    """
    path = resolve_model(model_name)
    options = _source_options(path, revision, trust_remote_code)
    config = _load_config(model_name, path, options)
    chosen = _choose_backend(backend, config.model_type)
    if chosen == "huggingface":
        site = parse_hook_point(hook_point, config)
        attention = FAMILIES[config.model_type].attention
        model = _load_weights(model_name, path, config, dtype, attention, options).to(device)
        return HuggingFaceModel(model, model_name, hook_point, site)
    if hook_point.startswith("blocks.") and not _layer_exists(hook_point, config):
        raise unknown_hook_point(hook_point, config)
    model = _load_weights(model_name, path, config, dtype, "eager", options).to(device)
    tokenizer = load_tokenizer(model_name, revision=revision, trust_remote_code=trust_remote_code)
    snapshot = snapshot_of(path, revision)
    if snapshot != path:
        # TransformerLens reads a tokenizer again by its name, at no revision. Known by the
        # directory that it was fetched into, it is the same one, and no hub is asked.
        tokenizer = load_tokenizer(snapshot, trust_remote_code=trust_remote_code)
    return TransformerLensModel(model, tokenizer, snapshot, model_name, hook_point)


def _layer_exists(hook_point: str, config: Any) -> bool:
    """Whether ``blocks.L.…`` names one of the model's layers."""
    block = hook_point.split(".")[1]
    return any(name.split(".")[1] == block for name in hook_points(config))


def _choose_backend(backend: str, family: str) -> str:
    mapped = family in FAMILIES
    if backend == "huggingface" and not mapped:
        known = ", ".join(FAMILIES)
        remedy = f"maps {known}, not {family}; set backend: transformer_lens"
        raise UserError("backend", backend, remedy)
    if backend == "huggingface" or (backend == "auto" and mapped):
        return "huggingface"
    if find_spec("transformer_lens") is None:
        remedy = f"{family} models need TransformerLens; install transformer-lens"
        raise UserError("backend", backend, remedy)
    return "transformer_lens"


def _load_config(model_name: str, path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    with _as_user_error(model_name, path, "configuration"):
        return AutoConfig.from_pretrained(path, **options)


def _load_weights(
    model_name: str, path: str, config: Any, dtype: str, attention: str, options: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM

    with _as_user_error(model_name, path, "weights"), _no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch_dtype(dtype),
            attn_implementation=attention,
            use_safetensors=True,
            **options,
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence the library's bar over the tensors of a file."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def _as_user_error(model_name: str, path: str, what: str) -> Iterator[None]:
    """Turn whatever the library raises about a model into one line.

    It raises OSError, ValueError and KeyError for missing files, an unreachable hub and broken
    JSON, and safetensors has an exception of its own derived from Exception only.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if Path(path).is_dir():
            remedy = f"its {what} cannot be read: {reason[:200]}"
        else:
            why = refusal(error) or reason[:200]
            remedy = f"its {what} cannot be fetched ({why}); {_OFFLINE}"
        raise UserError("model_name", model_name, remedy) from None
