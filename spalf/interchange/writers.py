"""A folded SAE in the files of SAELens, dictionary_learning and sparsify."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spalf.interchange.fold import FoldedSAE, unit_norm_decoder
from spalf.interchange.saelens import CONFIG_FILE, WEIGHTS_FILE
from spalf.models.sites import layer_and_kind

SAELENS_FORMAT = "6.54.12"
"""Version of SAELens whose format is written; older than 6.0 would be read another way."""


def write_saelens(weights: FoldedSAE, settings: Mapping[str, Any], out: Path) -> None:
    """Write what ``sae_lens.SAE.load_from_disk(out)`` reads as a JumpReLU SAE.

    Args:
        weights: folded.
        settings: of the run: ``model_name``, ``hook_point`` and, where known, more.
        out: an existing directory.
    """
    d_in, d_sae = weights.W_enc.shape
    dataset = settings.get("dataset") or {}
    metadata = {
        "sae_lens_version": SAELENS_FORMAT,
        "sae_lens_training_version": None,
        "model_name": settings.get("model_name"),
        "model_class_name": "HookedTransformer",
        "hook_name": settings.get("hook_point"),
        "hook_head_index": None,
        "context_size": settings.get("seq_len"),
        # Sequences are cut from packed documents, wherever one happens to begin.
        "prepend_bos": False,
        "dataset_path": dataset.get("path"),
        "target_l0": settings.get("L0_target"),
        "trained_with": "spalf",
    }
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": weights.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    save_file(weights.tensors(), out / WEIGHTS_FILE)
    _write_json(out / CONFIG_FILE, config)


def write_dictionary_learning(weights: FoldedSAE, settings: Mapping[str, Any], out: Path) -> None:
    """Write ``trainer_0/{ae.pt,config.json}``, a ``JumpReluAutoEncoder`` of dictionary_learning.

    That class cannot be told to subtract b_dec first, so ``weights`` must not ask for it. Their
    format wants a pickle; it is a plain mapping of names to tensors, which
    ``torch.load(weights_only=True)`` reads.
    """
    if weights.apply_b_dec_to_input:
        raise ValueError("a JumpReluAutoEncoder sees the activations as they are")
    folder = out / "trainer_0"
    folder.mkdir()
    d_in, d_sae = weights.W_enc.shape
    site = layer_and_kind(str(settings.get("hook_point")))
    layer, kind = site or (None, settings.get("hook_point"))
    trainer = {
        # What reads the file goes by the names of these two classes.
        "trainer_class": "JumpReluTrainer",
        "dict_class": "JumpReluAutoEncoder",
        "trained_with": "spalf",
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": layer,
        "lm_name": settings.get("model_name"),
        "submodule_name": None if layer is None else f"{str(kind)[5:]}_layer_{layer}",
        "lr": settings.get("lr"),
        "seed": settings.get("seed"),
        "target_l0": settings.get("L0_target"),
        "device": "cpu",
        "wandb_name": None,
    }
    buffer = {"d_submodule": d_in, "ctx_len": settings.get("seq_len")}
    torch.save(weights.tensors(), folder / "ae.pt")
    _write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer})


def write_sparsify(weights: FoldedSAE, settings: Mapping[str, Any], out: Path, k: int) -> None:
    """Write ``<hook point>/{sae.safetensors,cfg.json}``, a TopK ``SparseCoder`` of sparsify.

    sparsify has no thresholds: it keeps the k largest codes of every token. With decoder rows of
    norm 1 those are the k features that add most to the reconstruction. They are not the ones
    above their thresholds, so this is another SAE; see docs/interchange.md.

    Args:
        weights: folded with ``apply_b_dec_to_input``.
        settings: see `write_saelens`.
        out: an existing directory.
        k: active features of every token.
    """
    if not weights.apply_b_dec_to_input:
        raise ValueError("a SparseCoder subtracts b_dec from the activations")
    ranked = unit_norm_decoder(weights)
    d_in, d_sae = weights.W_enc.shape
    folder = out / str(settings.get("hook_point"))
    folder.mkdir()
    tensors = {
        "encoder.weight": ranked.W_enc.T.contiguous(),
        "encoder.bias": ranked.b_enc,
        "W_dec": ranked.W_dec,
        "b_dec": ranked.b_dec,
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, d_sae // d_in),
        "normalize_decoder": True,
        "num_latents": d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_in,
    }
    save_file(tensors, folder / "sae.safetensors")
    _write_json(folder / "cfg.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
