"""Calibration: tokens on disk, moments, whitener, anchors — once per model, site and dataset."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.activations import ActivationStore
from spalf.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from spalf.config import RunConfig
from spalf.data import TokenSplits, tokenize_dataset
from spalf.errors import UserError
from spalf.models import LanguageModel, load_tokenizer
from spalf.steps.context import StepContext, environment, exclusive
from spalf.whitening import SoftZCA, SplitHalfCovariance

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 2**22
"""Cap on the calibration stream: it ends there even if the covariance has not converged (M1)."""
SAMPLE_TOKENS = 16_384
"""Activations kept for initialisation: thresholds are quantiles over them (M5)."""
ANCHOR_TOKENS = 8192
"""Token directions kept, most frequent first; enough for F up to 16 times that (M3)."""
SEQUENCES_PER_UPDATE = 16


@dataclass(frozen=True)
class Calibration:
    """What later steps read of a calibration directory.

    Attributes:
        splits: token sequences.
        whitener: soft-ZCA transform of the site.
        scale: √(tr Σ/d), the unit of the SAE's codes.
        sample: activations of the calibration split, ``[tokens, d_model]``.
        token_directions: centred unembedding columns as rows, most frequent token first.
        measured: derived parameters found here, by name.
        digests: digests of its files, by name.
    """

    splits: TokenSplits
    whitener: SoftZCA
    scale: float
    sample: Tensor
    token_directions: Tensor
    measured: dict[str, float | int]
    digests: dict[str, str]


def calibrate(config: RunConfig, out: Path, context: StepContext) -> None:
    """Tokenise the dataset, estimate μ and Σ, fit the whitener, pick the anchors (M1–M3, M17).

    Writes ``tokens/``, ``calibration.safetensors`` and ``metadata.json`` into ``out``.

    Raises:
        UserError: model, dataset or site cannot be used; nothing but tokens has been written.
    """
    model = context.load_model(config)
    tokenizer = load_tokenizer(
        config.model_name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    with exclusive(out.with_name(f"{out.name}.checkpoints")):
        splits = tokenize_dataset(
            config.dataset,
            tokenizer,
            out / "tokens",
            seq_len=config.seq_len,
            train_tokens=config.total_tokens,
            calibration_tokens=CALIBRATION_TOKENS,
            evaluation_tokens=config.evaluate.tokens,
        )
        tensors, facts = _measure(config, model, splits, context)
        metadata = {
            "step": "calibrate",
            "measured": facts,
            "model": {
                "model_name": config.model_name,
                "hook_point": config.hook_point,
                "d_model": model.d_model,
                "d_vocab": model.d_vocab,
            },
            "environment": environment(context),
        }
        out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(out, Checkpoint({"calibration": tensors}, metadata))


def _measure(
    config: RunConfig, model: LanguageModel, splits: TokenSplits, context: StepContext
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    store = ActivationStore(model, splits.calibration, seed=0)
    covariance, counts, sample, rate = _stream(config, store, context)
    moments, error = covariance.merged(), covariance.error()
    constants = config.constants
    if config.method.whitening:
        whitener = SoftZCA.fit(moments, constants.kappa, constants.delta_rank)
    else:
        whitener = SoftZCA.identity(moments.mean)
    variance = float(moments.covariance.trace())
    directions, token_ids = token_directions(model.unembedding(), counts)
    tensors = {f"whitener.{name}": value for name, value in whitener.tensors().items()}
    tensors |= {"covariance": moments.covariance, "sample": sample}
    tensors |= {"token_directions": directions, "token_ids": token_ids, "token_counts": counts}
    facts = {
        "calibration_tokens": covariance.count,
        "split_half_error": error,
        "ended_by": "converged" if error <= constants.delta_cov else "tokens",
        "variance": variance,
        "scale": (variance / model.d_model) ** 0.5,
        "whitener_rank": whitener.rank,
        "alpha": whitener.alpha,
        "harvest_tokens_per_second": rate,
    }
    return tensors, facts


def _stream(
    config: RunConfig, store: ActivationStore, context: StepContext
) -> tuple[SplitHalfCovariance, Tensor, Tensor, float]:
    """Run the calibration split until the gate opens or it ends (M1)."""
    model, stream = store.model, store.stream
    covariance = SplitHalfCovariance(model.d_model, context.device)
    counts = torch.zeros(model.d_vocab, dtype=torch.int64)
    sample: list[Tensor] = []
    progress = context.progress("calibrate", stream.n_sequences * stream.seq_len, 0)
    started = time.monotonic()
    for start in range(0, stream.n_sequences, SEQUENCES_PER_UPDATE):
        taken = min(SEQUENCES_PER_UPDATE, stream.n_sequences - start)
        x = store.harvest(start, taken)
        covariance.update(x)
        tokens = stream.sequences(start, taken, seed=store.seed)
        counts += torch.bincount(tokens.flatten(), minlength=model.d_vocab)
        if covariance.count - len(x) < SAMPLE_TOKENS:
            sample.append(x)
        even = (start // SEQUENCES_PER_UPDATE) % 2 == 1
        error = covariance.error() if even else float("inf")
        progress.update(len(x), {"split-half": error} if even else None)
        if covariance.count >= SAMPLE_TOKENS and error <= config.constants.delta_cov:
            break
    else:
        logger.warning(
            "the calibration split ended after %d tokens with a split-half error of %.3f, above "
            "delta_cov = %g: Σ is known to that accuracy only",
            covariance.count,
            covariance.error(),
            config.constants.delta_cov,
        )
    progress.close()
    rate = covariance.count / max(1e-9, time.monotonic() - started)
    return covariance, counts, torch.cat(sample)[:SAMPLE_TOKENS], rate


def token_directions(unembedding: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Centred unembedding columns of the most frequent tokens (M3).

    Args:
        unembedding: W_U, ``[d_model, d_vocab]``.
        counts: occurrences of each token, ``[d_vocab]``.

    Returns:
        Directions as rows ``[n, d_model]``, and their token ids ``[n]``, most frequent first.
    """
    centred = (unembedding - unembedding.mean(dim=1, keepdim=True)).T
    # Stable, so that ties fall the same way everywhere.
    order = torch.sort(counts, descending=True, stable=True).indices[:ANCHOR_TOKENS]
    order = order[order < centred.shape[0]]
    return centred[order.to(centred.device)], order


def load_calibration(directory: Path, config: RunConfig, device: torch.device) -> Calibration:
    """Read what `calibrate` wrote.

    Raises:
        UserError: a file is missing or damaged, or belongs to another model or site.
    """
    checkpoint = read_checkpoint(directory, device)
    for key in ("model_name", "hook_point"):
        found, wanted = checkpoint.metadata["model"][key], getattr(config, key)
        if found != wanted:
            raise UserError(key, wanted, f"the calibration in {directory} is of {found!r}")
    tensors, measured = checkpoint.tensors["calibration"], checkpoint.metadata["measured"]
    prefix = "whitener."
    whitener = SoftZCA.from_tensors(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return Calibration(
        splits=TokenSplits.open(directory / "tokens"),
        whitener=whitener,
        scale=measured["scale"],
        sample=tensors["sample"],
        token_directions=tensors["token_directions"],
        measured=measured,
        digests=dict(checkpoint.metadata["digests"]),
    )
