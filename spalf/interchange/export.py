"""``spalf export``: a trained SAE as a folder that another tool reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from spalf.checkpoint import naming
from spalf.errors import UserError
from spalf.interchange.card import Subject, model_card
from spalf.interchange.fold import fold, unit_norm_decoder
from spalf.interchange.load import load_sae
from spalf.interchange.writers import write_dictionary_learning, write_saelens, write_sparsify
from spalf.sae import StratifiedSAE

Format = Literal["saelens", "dictionary_learning", "sparsify"]
"""The tools whose formats are written."""

CARD_FILE = "README.md"


def export(
    directory: Path,
    out: Path,
    format: str,
    *,
    k: int | None = None,
    unit_norm: bool = False,
    card: bool = False,
    evaluation: Path | None = None,
) -> None:
    """Write a trained SAE in another tool's format, whitening and scale folded into the weights.

    Args:
        directory: an ``init``, ``phase1`` or ``phase2`` directory.
        out: the folder to make; all of it appears at once.
        format: whose: one of `Format`.
        k: active features per token; for ``sparsify``, which has no thresholds, and only for it.
        unit_norm: scale codes so that decoder rows have norm 1; always so for ``sparsify``.
        card: add a model card for the Hugging Face hub.
        evaluation: the run's ``evaluation.json`` for the card; by default the one beside
            ``directory``, if there is one.

    Raises:
        UserError: there is no SAE to export, ``out`` exists, the options do not fit the format, or
            the evaluation is of another SAE.
    """
    _require_options(format, k)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("out", str(out), "exists already; delete it, or give another place")
    sae = load_sae(directory)
    if not isinstance(sae.coder, StratifiedSAE):
        raise UserError("directory", str(directory), "is not an SAE of this package")
    settings = sae.metadata.get("config", {})
    text = model_card(Subject(sae, settings, format, k), evaluation) if card else None
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with naming(out):
        temporary.mkdir(parents=True)
        try:
            _write(sae.coder, settings, temporary, format, k, unit_norm)
            if text is not None:
                (temporary / CARD_FILE).write_text(text, encoding="utf-8")
            _share(temporary)
            if out.exists():
                out.rmdir()
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _share(folder: Path) -> None:
    """Let whoever may read the rest read the tensors; safetensors keeps them to the owner."""
    mode = next(folder.rglob("*.json")).stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _require_options(format: str, k: int | None) -> None:
    if format not in get_args(Format):
        raise UserError("format", format, f"must be one of {', '.join(get_args(Format))}")
    if format == "sparsify" and k is None:
        remedy = (
            "sparsify keeps a fixed number of features per token and has no thresholds, so the "
            "export is another SAE with the same weights; give that number as --k to accept this"
        )
        raise UserError("format", format, remedy)
    if format != "sparsify" and k is not None:
        raise UserError("--k", k, f"is for sparsify only; {format} keeps the thresholds")


def _write(
    coder: StratifiedSAE,
    settings: Mapping[str, Any],
    out: Path,
    format: str,
    k: int | None,
    unit_norm: bool,
) -> None:
    weights = fold(coder, apply_b_dec_to_input=format != "dictionary_learning")
    if unit_norm:
        weights = unit_norm_decoder(weights)
    if format == "saelens":
        write_saelens(weights, settings, out)
    elif format == "dictionary_learning":
        write_dictionary_learning(weights, settings, out)
    elif k is None or not 0 < k <= coder.d_sae:
        raise UserError("--k", k, f"must lie between 1 and F = {coder.d_sae}")
    else:
        write_sparsify(weights, settings, out, k)
