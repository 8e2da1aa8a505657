"""``spalf import``: an SAE made with SAELens as something the evaluation and the tables know."""

from __future__ import annotations

import re
from pathlib import Path

from spalf.checkpoint import Checkpoint, write_checkpoint
from spalf.errors import UserError
from spalf.interchange.saelens import CONFIG_FILE, WEIGHTS_FILE, SAELensSAE, read_saelens

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def import_sae(source: Path, out: Path, l0_target: float | None = None) -> None:
    """Copy a SAELens folder to where it can be evaluated, with digests of its files.

    Its rows in the tables, and its line in the figures, go by the last part of ``out``.

    Args:
        source: a SAELens folder of an architecture that `read_saelens` reads.
        out: the folder to make; the workflow looks in ``results/<model>/imported``.
        l0_target: active features per token it was made for; needed where it does not say.

    Raises:
        UserError: the source is damaged or not supported, its L0 is not known, or ``out`` exists.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError("out", str(out), "exists already; delete it, or give another place")
    if not _NAME.fullmatch(out.name) or out.name == "spalf":
        remedy = "names the SAE in the tables: letters, digits, '.', '_' and '-', and not spalf"
        raise UserError("out", out.name, remedy)
    sae = read_saelens(source)
    target = l0_target or _l0_of(sae)
    if target is None:
        remedy = "its folder does not say what L0 it was made for; give that as --l0-target"
        raise UserError("source", str(source), remedy)
    if not 0 < target < sae.d_sae:
        raise UserError("--l0-target", target, f"must lie between 0 and d_sae = {sae.d_sae}")
    hyperparameters = {"architecture": sae.cfg.architecture}
    hyperparameters |= {"imported_from": source.resolve().name}
    metadata = {
        "step": "import",
        "method": out.name,
        "config": {
            "model_name": sae.cfg.metadata.get("model_name"),
            "hook_point": sae.cfg.metadata.get("hook_name"),
            "F": sae.d_sae,
            "L0_target": target,
        },
        # What the evaluation asks of any SAE in SAELens's format.
        "baseline": {
            "lr": None,
            "hyperparameters": hyperparameters,
            "rates": [],
            "train_tokens": None,
        },
    }
    files = {name: source / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, Checkpoint({}, metadata, files))


def _l0_of(sae: SAELensSAE) -> float | None:
    """The L0 an SAE was made for, where its configuration tells."""
    known = {**sae.cfg.metadata, "k": sae.cfg.k or sae.cfg.metadata.get("k")}
    found = next((known[name] for name in ("k", "target_l0") if known.get(name)), None)
    return None if found is None else float(found)
