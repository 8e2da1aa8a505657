"""A trained SAE for use from Python: read, checked, frozen, and put back into a language model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.checkpoint import read_checkpoint
from spalf.errors import UserError
from spalf.interchange.saelens import SAELensSAE, is_saelens_folder, read_saelens
from spalf.models import patched_site
from spalf.sae import StratifiedSAE
from spalf.training.state import sae_from_tensors

STEPS = ("phase2", "phase1", "init")
"""Directories of a cell that hold an SAE, the most trained first."""

USED_FILES = ("model", "tensors")
"""The files of a checkpoint that an SAE is made of."""


@dataclass(frozen=True, eq=False)
class LoadedSAE:
    """A trained SAE: frozen, float32, in evaluation mode. Gradients flow to activations only.

    Attributes:
        coder: the SAE itself, in its own units (`StratifiedSAE`, or one read from SAELens).
        model_name: the language model it was trained on, as written in its configuration.
        hook_point: the site, a TransformerLens hook name; ``None`` where that is not recorded.
        metadata: what its directory says about it.
        source: that directory.
    """

    coder: StratifiedSAE | SAELensSAE
    model_name: str | None
    hook_point: str | None
    metadata: Mapping[str, Any]
    source: Path

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.coder.d_model

    @property
    def d_sae(self) -> int:
        """Dictionary size F."""
        return self.coder.d_sae

    @property
    def device(self) -> torch.device:
        """Where the weights are; activations must be there too."""
        return self.coder.W_dec.device

    @property
    def scale(self) -> float:
        """Length that one unit of decoder output stands for; 1 for SAEs of other tools."""
        return self.coder.scale if isinstance(self.coder, StratifiedSAE) else 1.0

    @property
    def W_dec(self) -> Tensor:
        """What one unit of each code adds to the reconstruction, ``[d_sae, d_model]``."""
        return self.coder.W_dec.detach() * self.scale

    @property
    def b_dec(self) -> Tensor:
        """The reconstruction where no feature is active, ``[d_model]``."""
        return self.coder.b_dec.detach() * self.scale

    @property
    def threshold(self) -> Tensor:
        """θ: a code is either 0 or larger than this, ``[d_sae]``."""
        return self.coder.threshold.detach()

    def encode(self, x: Tensor) -> Tensor:
        """Codes z ≥ 0, float32 ``[..., d_sae]``, of activations ``x [..., d_model]`` (M4).

        Raises:
            UserError: the activations have another width.
        """
        if x.shape[-1] != self.d_model:
            remedy = f"activations must be [..., {self.d_model}] for this SAE"
            raise UserError("x", list(x.shape), remedy)
        return self.coder.encode(x.float())

    def decode(self, z: Tensor) -> Tensor:
        """Activations, float32 ``[..., d_model]``, from codes ``z [..., d_sae]``."""
        return self.coder.decode(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """x̂ = decode(encode(x)), float32 of the shape of ``x``."""
        return self.decode(self.encode(x))


def load_sae(directory: str | Path, device: torch.device | str | None = None) -> LoadedSAE:
    """Load a trained SAE.

    Args:
        directory: an ``init``, ``phase1`` or ``phase2`` directory, any other checkpoint (of it
            ``metadata.json``, ``model.safetensors`` and ``tensors.safetensors`` are read), or a
            SAELens folder.
        device: where it goes; by default the CPU.

    Raises:
        UserError: there is no SAE there, or a file does not match its digest.
    """
    directory, place = Path(directory), torch.device(device or torch.get_default_device())
    if is_saelens_folder(directory):
        return _from_saelens(directory, place)
    _require_checkpoint(directory)
    checkpoint = read_checkpoint(directory, place, stems=USED_FILES)
    if set(checkpoint.tensors) != set(USED_FILES):
        remedy = f"holds no SAE; give one of {', '.join(STEPS)}"
        raise UserError("directory", str(directory), remedy)
    # A resumable checkpoint knows its run by the fingerprint only.
    settings = checkpoint.metadata.get("config") or checkpoint.metadata.get("fingerprint", {})
    coder = sae_from_tensors(checkpoint.tensors, place).eval().requires_grad_(False)
    return LoadedSAE(
        coder=coder,
        model_name=settings.get("model_name"),
        hook_point=settings.get("hook_point"),
        metadata=checkpoint.metadata,
        source=directory,
    )


def _from_saelens(directory: Path, device: torch.device) -> LoadedSAE:
    if (directory / "metadata.json").is_file():  # of a baseline, or imported
        read_checkpoint(directory)
    coder = read_saelens(directory, device)
    known = coder.cfg.metadata
    return LoadedSAE(coder, known.get("model_name"), known.get("hook_name"), known, directory)


def _require_checkpoint(directory: Path) -> None:
    if (directory / "metadata.json").is_file():
        return
    if not directory.is_dir():
        raise UserError("directory", str(directory), "no such directory")
    inside = [name for name in STEPS if (directory / name / "metadata.json").is_file()]
    remedy = f"give {directory / inside[0]}" if inside else f"give one of {', '.join(STEPS)}"
    raise UserError("directory", str(directory), f"holds no SAE; {remedy}")


def patched(
    model: Any, sae: LoadedSAE, hook_point: str | None = None
) -> AbstractContextManager[None]:
    """While it lasts, the model works with the SAE's reconstruction in place of its activations.

    Every forward pass inside the ``with`` has x̂ at the site, whatever calls it: a plain call,
    generation, or a loss that is differentiated. Afterwards the model is what it was.

    Args:
        model: what `spalf.models.load_model` gave, a Hugging Face causal language model, or a
            model of TransformerLens; see `spalf.models.patched_site`.
        sae: on the model's device.
        hook_point: where to put x̂; by default the site the SAE was trained on.

    Raises:
        UserError: the model has no such site, or (at the first forward pass) one of another width.
    """
    site = hook_point or sae.hook_point
    if site is None:
        raise UserError("hook_point", None, "is not recorded with this SAE; say which site")
    return patched_site(model, site, sae.reconstruct)
