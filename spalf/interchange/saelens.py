"""SAEs in SAELens's format on disk, read and applied without SAELens.

A SAELens folder holds ``cfg.json`` and ``sae_weights.safetensors``. Its architectures differ in the
gate alone, so one class serves them all: pre = (x − b_dec·flag)·W_enc + b_enc, then

- ``jumprelu``: z = relu(pre)·1[pre > θ] (BatchTopK SAEs are saved as this),
- ``standard``: z = relu(pre),
- ``topk``: z = relu(pre) on the k largest entries of each token,

and x̂ = z·W_dec + b_dec. What SAELens estimates while it trains, the scale of the activations or
their whitening, it folds into the weights before it saves them.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spalf.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

TENSORS = {
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
}
"""The tensors of each architecture that is read."""

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
"""What may be done to activations before they are encoded; the last two while the SAE runs."""

_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class SAELensConfig:
    """The fields of ``cfg.json`` that decide what the SAE computes.

    Attributes:
        architecture: ``jumprelu``, ``standard`` or ``topk``.
        d_in: width of the activations.
        d_sae: dictionary size.
        apply_b_dec_to_input: whether b_dec is subtracted before encoding.
        normalize_activations: one of `NORMALISATIONS`.
        k: features kept of each token; ``topk`` only.
        rescale_acts_by_decoder_norm: whether ``topk`` chooses by pre·‖W_dec‖ and codes are in that
            unit.
        metadata: everything SAELens notes about model, site and training.
    """

    architecture: str
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool
    normalize_activations: str
    k: int | None
    rescale_acts_by_decoder_norm: bool
    metadata: Mapping[str, Any]


class SAELensSAE(nn.Module):
    """An SAE read from a SAELens folder, with its weights as float32 buffers.

    Attributes:
        cfg: what it computes.
        W_enc: ``[d_model, d_sae]``, as SAELens has it.
        b_enc: ``[d_sae]``.
        W_dec: decoder directions, ``[d_sae, d_model]``.
        b_dec: ``[d_model]``.
        threshold: θ, ``[d_sae]``; zeros where the architecture has none.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(self, cfg: SAELensConfig, tensors: Mapping[str, Tensor]) -> None:
        """Hold ``tensors``, which `TENSORS` names, and apply them as ``cfg`` says."""
        super().__init__()
        self.cfg = cfg
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().to(torch.float32))
        if "threshold" not in tensors:
            self.register_buffer("threshold", torch.zeros_like(self.b_enc))
        self._undo: tuple[Tensor, Tensor | None] | None = None

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Dictionary size."""
        return self.cfg.d_sae

    @property
    def has_thresholds(self) -> bool:
        """Whether scaling the thresholds means anything for this architecture."""
        return self.cfg.architecture == "jumprelu"

    def pre_activations(self, x: Tensor) -> Tensor:
        """``[..., d_model]`` → ``[..., d_sae]``, before the gate."""
        centred = self._normalised(x.to(torch.float32))
        if self.cfg.apply_b_dec_to_input:
            centred = centred - self.b_dec
        return centred @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Codes z ≥ 0 of activations: ``[..., d_model]`` → ``[..., d_sae]``."""
        pre = self.pre_activations(x)
        if self.cfg.architecture != "topk":
            return pre.relu() * (pre > self.threshold)
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self._decoder_norm()
        largest = pre.topk(self.cfg.k or 0, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, largest.indices, largest.values.relu())

    def decode(self, z: Tensor) -> Tensor:
        """Activations from codes: ``[..., d_sae]`` → ``[..., d_model]``.

        Where the SAE normalises each token while it runs, the normalisation undone is that of the
        activations encoded last, as SAELens does it.
        """
        if self.cfg.architecture == "topk" and self.cfg.rescale_acts_by_decoder_norm:
            z = z / self._decoder_norm()
        x_hat = z @ self.W_dec + self.b_dec
        if self._undo is not None:
            scale, shift = self._undo
            x_hat = x_hat * scale if shift is None else x_hat * scale + shift
        return x_hat

    def scaled_thresholds(self, factor: float) -> SAELensSAE:
        """A view on the same weights with every θ multiplied by ``factor``.

        Raises:
            UserError: the architecture has no thresholds.
        """
        if not self.has_thresholds:
            remedy = "has no thresholds to scale; only a jumprelu SAE has"
            raise UserError("architecture", self.cfg.architecture, remedy)
        view = copy.copy(self)
        view._buffers = {**self._buffers, "threshold": self.threshold * factor}
        return view

    def _decoder_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def _normalised(self, x: Tensor) -> Tensor:
        """``x`` as the encoder wants it; remembers how `decode` gets back."""
        if self.cfg.normalize_activations == "constant_norm_rescale":
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.cfg.d_in**0.5
            self._undo = norm, None
            return x / norm
        if self.cfg.normalize_activations == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            std = (x - mean).std(dim=-1, keepdim=True)
            self._undo = std, mean
            return (x - mean) / (std + _LAYER_NORM_EPS)
        return x


def is_saelens_folder(folder: Path) -> bool:
    """Whether ``folder`` holds the two files of a SAELens SAE."""
    return all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def read_saelens(folder: Path, device: torch.device | str | None = None) -> SAELensSAE:
    """Read the SAE of a SAELens folder.

    Args:
        folder: what ``save_inference_model`` or ``save_model`` of an inference SAE wrote.
        device: where the weights go; by default the CPU.

    Raises:
        UserError: a file is missing or damaged, the architecture is none of `TENSORS`, or the
            weights do not fit the configuration.
    """
    cfg = read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(str(path), None, "no such file; give a SAELens folder") from None
    except (OSError, SafetensorError) as error:
        raise UserError(str(path), None, f"cannot be read ({error}); copy it again") from None
    scaling = tensors.pop("scaling_factor", torch.ones(1))  # of old folders; 1 unless fine-tuned
    if not torch.allclose(scaling.float(), torch.ones_like(scaling, dtype=torch.float32)):
        remedy = "scales its codes after fine-tuning, which is not supported; fold it in SAELens"
        raise UserError(str(path), None, remedy)
    _require_shapes(path, cfg, tensors)
    return SAELensSAE(cfg, tensors).to(device).eval()


def read_config(folder: Path) -> SAELensConfig:
    """Read ``cfg.json`` of a SAELens folder, of any version since the format has one.

    Raises:
        UserError: the file is missing or damaged, or names something that is not supported.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        cfg = _config(_modern(raw))
    except FileNotFoundError:
        raise UserError(str(path), None, "no such file; give a SAELens folder") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(str(path), None, f"is no SAELens configuration ({error})") from None
    except KeyError as error:
        raise UserError(str(path), None, f"lacks {error}; save the SAE again") from None
    _require_supported(path, cfg)
    return cfg


def _modern(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the names of SAELens 6; older ones lack or spell some differently."""
    activation = raw.get("activation_fn_str", raw.get("activation_fn"))
    known = {"architecture": "standard", **raw}
    if activation == "topk":
        arguments = raw.get("activation_fn_kwargs") or {}
        known |= {"architecture": "topk", "k": arguments.get("k", raw.get("k"))}
    normalisation = raw.get("normalize_activations")
    if isinstance(normalisation, bool) or normalisation is None:
        known["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    if "metadata" not in known:
        weights = ("d_in", "d_sae", "dtype", "device")
        known["metadata"] = {key: value for key, value in raw.items() if key not in weights}
    return known


def _config(known: Mapping[str, Any]) -> SAELensConfig:
    k = known.get("k")
    return SAELensConfig(
        architecture=str(known["architecture"]),
        d_in=int(known["d_in"]),
        d_sae=int(known["d_sae"]),
        apply_b_dec_to_input=bool(known.get("apply_b_dec_to_input", True)),
        normalize_activations=str(known["normalize_activations"]),
        k=None if k is None else int(k),
        rescale_acts_by_decoder_norm=bool(known.get("rescale_acts_by_decoder_norm", False)),
        metadata=dict(known["metadata"]),
    )


def _require_supported(path: Path, cfg: SAELensConfig) -> None:
    if cfg.architecture not in TENSORS:
        remedy = (
            f"cannot be read; {', '.join(TENSORS)} can (BatchTopK as save_inference_model has it)"
        )
        raise UserError(f"{path}: architecture", cfg.architecture, remedy)
    if cfg.normalize_activations not in NORMALISATIONS:
        remedy = f"must be folded into the weights first, or be one of {', '.join(NORMALISATIONS)}"
        raise UserError(f"{path}: normalize_activations", cfg.normalize_activations, remedy)
    if cfg.normalize_activations == "expected_average_only_in":
        logger.warning(
            "%s: the scale of the activations was not folded into these weights; "
            "they are applied to the activations as they are, as SAELens does",
            path,
        )
    if cfg.architecture == "topk" and not 0 < (cfg.k or 0) <= cfg.d_sae:
        raise UserError(f"{path}: k", cfg.k, f"must lie between 1 and d_sae = {cfg.d_sae}")


def _require_shapes(path: Path, cfg: SAELensConfig, tensors: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(TENSORS[cfg.architecture]):
        wanted = ", ".join(TENSORS[cfg.architecture])
        remedy = f"holds {', '.join(sorted(tensors))}; a {cfg.architecture} SAE has {wanted}"
        raise UserError(str(path), None, remedy)
    shapes = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (cfg.d_sae,))
        if tuple(tensor.shape) != shape:
            remedy = f"has shape {tuple(tensor.shape)}, but {CONFIG_FILE} asks for {shape}"
            raise UserError(f"{path}: {name}", None, remedy)
