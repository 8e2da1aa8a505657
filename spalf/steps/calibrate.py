"""Calibration: tokens on disk, moments, whitener, anchors — once per model, site and dataset."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.activations import ActivationStore, fisher_information
from spalf.activations.store import ORDER
from spalf.checkpoint import (
    Checkpoint,
    CheckpointStore,
    differences,
    fingerprint,
    read_checkpoint,
    write_checkpoint,
)
from spalf.config import RunConfig
from spalf.data import TokenSplits
from spalf.errors import Diverged, Interrupted, StopRequested, UserError
from spalf.steps.context import (
    CheckpointClock,
    Progress,
    StepContext,
    environment,
    exclusive,
    working_directory,
    write_json,
)
from spalf.steps.keep import keep_finished, take_finished
from spalf.steps.sources import RECORD, Sources, find_sources, recorded_sources
from spalf.steps.tokens import place_tokens, tokens_name, tokens_of
from spalf.whitening import SoftZCA, SplitHalfCovariance

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 16_384
"""Activations kept for initialisation: thresholds are quantiles over them (M5)."""
ANCHOR_TOKENS = 8192
"""Token directions kept, most frequent first; enough for F up to 16 times that (M3)."""
CONTENTS = 2
"""Raised when calibrations hold something new, so that older ones are not taken for finished."""
FISHER_TOKENS = 32_768
"""Tokens of the calibration split on which the Fisher information is estimated (M8)."""
FISHER_TOKENS_PER_PASS = 1024
"""Of them, those whose logits are held at a time."""
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
        token_ids: their tokens.
        covariance: Σ, float64 ``[d_model, d_model]``.
        fisher: G, float32 ``[d_model, d_model]``; not finite where the predictions overflow.
        measured: derived parameters found here, by name.
        digests: digests of its files, by name.
        sources: the state of model and dataset that was read, and is to be read.
    """

    splits: TokenSplits
    whitener: SoftZCA
    scale: float
    sample: Tensor
    token_directions: Tensor
    token_ids: Tensor
    covariance: Tensor
    fisher: Tensor
    measured: dict[str, float | int]
    digests: dict[str, str]
    sources: Sources


def calibrate(config: RunConfig, out: Path, context: StepContext) -> None:
    """Tokenise the dataset, estimate μ and Σ, fit the whitener, pick the anchors (M1–M3, M17).

    Writes ``tokens/``, ``calibration.safetensors`` and ``metadata.json`` into ``out``; resumes from
    ``<out>.checkpoints`` where that holds a checkpoint of the same calibration.

    Raises:
        UserError: model, dataset or site cannot be used; nothing has been written.
        Interrupted: asked to stop; a checkpoint was written.
        Diverged: activations were not finite; the last checkpoint is kept.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        sources = find_sources(config, recorded_sources(out, working_directory(out)))
    pinned = sources.pinned(config)
    model = context.load_model(pinned)
    with exclusive(out, context) as working:
        identity = fingerprint(calibration_settings(config), sources.inputs())
        if take_finished(out, identity, context):
            return
        write_json(working / RECORD, sources.to_json())
        tokens = working / tokens_name(calibration_settings(config), sources)
        splits = tokens_of(pinned, model, tokens, context)
        store = ActivationStore(model, splits.calibration, context.pause_point)
        checkpoints = CheckpointStore(working, identity, context.if_foreign)
        tensors, facts = _measure(config, store, checkpoints, context)
        metadata = {
            "step": "calibrate",
            "measured": facts,
            "model": {
                "model_name": config.model_name,
                "hook_point": config.hook_point,
                "d_model": model.d_model,
                "d_vocab": model.d_vocab,
            },
            "sources": sources.to_json(),
            "fingerprint": identity,
            "environment": environment(context),
        }
        out.mkdir(parents=True, exist_ok=True)
        files = place_tokens(tokens, out)
        write_checkpoint(out, Checkpoint({"calibration": tensors}, metadata, files))
        keep_finished(out, identity, context)


def calibration_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that a calibration depends on."""
    settings = config.model_dump(
        mode="json",
        include={
            **dict.fromkeys(("model_name", "hook_point", "revision", "backend", "dtype"), True),
            **dict.fromkeys(("trust_remote_code", "dataset", "total_tokens", "seq_len"), True),
            "evaluate": {"tokens"},
            "method": {"whitening"},
            "constants": {"delta_cov", "delta_rank", "kappa"},
        },
    )
    return {**settings, "contents": CONTENTS}


def _measure(
    config: RunConfig, store: ActivationStore, checkpoints: CheckpointStore, context: StepContext
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    seen, rate = _stream(config, store, checkpoints, context)
    with context.nothing_to_lose():
        return _results(config, store, seen, rate, context)


def _results(
    config: RunConfig, store: ActivationStore, seen: _Seen, rate: float, context: StepContext
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, covariance, counts = store.model, seen.covariance, seen.counts
    moments, error = covariance.merged(), covariance.error()
    constants = config.constants
    if config.method.whitening:
        whitener = SoftZCA.fit(moments, constants.kappa, constants.delta_rank)
    else:
        whitener = SoftZCA.identity(moments.mean)
    variance = float(moments.covariance.trace())
    directions, token_ids = token_directions(model.unembedding(), counts)
    tensors = {f"whitener.{name}": value for name, value in whitener.tensors().items()}
    tensors |= {"covariance": moments.covariance, "sample": torch.cat(seen.sample)[:SAMPLE_TOKENS]}
    tensors |= {"token_directions": directions, "token_ids": token_ids, "token_counts": counts}
    tensors["fisher"] = _fisher(store, context)
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


def _fisher(store: ActivationStore, context: StepContext) -> Tensor:
    """The Fisher information on the first tokens of the split (M8)."""
    model, stream = store.model, store.stream
    per_pass = max(1, FISHER_TOKENS_PER_PASS // stream.seq_len)
    last = min(stream.n_sequences, max(1, FISHER_TOKENS // stream.seq_len))
    progress = context.progress("calibrate, Fisher information", last * stream.seq_len, 0)

    def batches() -> Iterator[Tensor]:
        for first in range(0, last, per_pass):
            tokens = stream.sequences(first, min(per_pass, last - first), seed=ORDER)
            yield tokens.to(model.device)
            progress.update(tokens.numel())

    try:
        return fisher_information(model, batches()).float()
    finally:
        progress.close()


@dataclass
class _Seen:
    """What calibration has gathered of the stream.

    Attributes:
        covariance: both halves.
        counts: occurrences of each token, ``[d_vocab]``.
        sample: the first activations, batch by batch.
        position: index of the next sequence.
        ended: whether that was enough.
    """

    covariance: SplitHalfCovariance
    counts: Tensor
    sample: list[Tensor]
    position: int = 0
    ended: bool = False

    def to_checkpoint(self) -> Checkpoint:
        """As the contents of a checkpoint directory."""
        tensors = {f"covariance.{k}": v for k, v in self.covariance.state_dict().items()}
        tensors |= {"counts": self.counts}
        tensors |= {f"sample.{i:04d}": batch for i, batch in enumerate(self.sample)}
        metadata = {"position": self.position, "ended": self.ended}
        return Checkpoint({"calibration": tensors}, metadata)

    def restore(self, saved: Checkpoint, device: torch.device) -> None:
        """Inverse of `to_checkpoint`; going on is bit-identical."""
        tensors, prefix = saved.tensors["calibration"], "covariance."
        self.covariance.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.counts = tensors["counts"]
        self.sample = [tensors[k].to(device) for k in sorted(tensors) if k.startswith("sample.")]
        self.position, self.ended = saved.metadata["position"], saved.metadata["ended"]


def _stream(
    config: RunConfig, store: ActivationStore, checkpoints: CheckpointStore, context: StepContext
) -> tuple[_Seen, float]:
    """Run the calibration split until the gate opens or it ends (M1); also tokens per second."""
    model, stream = store.model, store.stream
    seen = _Seen(
        SplitHalfCovariance(model.d_model, context.device),
        torch.zeros(model.d_vocab, dtype=torch.int64),
        [],
    )
    saved = checkpoints.latest("cpu")
    if saved:
        seen.restore(saved, context.device)
        logger.info("resuming calibration at sequence %d", seen.position)
    progress = context.progress(
        "calibrate", stream.n_sequences * stream.seq_len, seen.position * stream.seq_len
    )
    before, started = seen.covariance.count, time.monotonic()
    try:
        _gather(config, store, seen, checkpoints, progress)
    except StopRequested:
        checkpoints.save(seen.position, seen.to_checkpoint())
        raise Interrupted(seen.position, "sequence") from None
    finally:
        progress.close()
    return seen, (seen.covariance.count - before) / max(1e-9, time.monotonic() - started)


def _gather(
    config: RunConfig,
    store: ActivationStore,
    seen: _Seen,
    checkpoints: CheckpointStore,
    progress: Progress,
) -> None:
    runtime, stream = config.runtime, store.stream
    clock = CheckpointClock(runtime.checkpoint_every_minutes, runtime.checkpoint_every_steps)
    while seen.position < stream.n_sequences and not seen.ended:
        update = seen.position // SEQUENCES_PER_UPDATE
        taken = min(SEQUENCES_PER_UPDATE, stream.n_sequences - seen.position)
        x = store.harvest(seen.position, taken)
        tokens = stream.sequences(seen.position, taken, seed=ORDER)
        _require_finite(x, update, seen.position, taken)
        if seen.covariance.count < SAMPLE_TOKENS:
            seen.sample.append(x)
        seen.covariance.update(x)
        seen.counts += torch.bincount(tokens.flatten(), minlength=len(seen.counts))
        seen.position += taken
        even = update % 2 == 1
        error = seen.covariance.error() if even else float("inf")
        progress.update(len(x), {"split-half": error} if even else None)
        seen.ended = seen.covariance.count >= SAMPLE_TOKENS and error <= config.constants.delta_cov
        # What follows, the eigenvectors of a wide model, can take longer than all of this.
        if seen.ended or seen.position >= stream.n_sequences or clock.due(update + 1):
            with clock.timed():
                checkpoints.save(seen.position, seen.to_checkpoint())
    if seen.ended:
        return
    logger.warning(
        "the calibration split ended after %d tokens with a split-half error of %.3f, above "
        "delta_cov = %g: Σ is known to that accuracy only",
        seen.covariance.count,
        seen.covariance.error(),
        config.constants.delta_cov,
    )


def _require_finite(x: Tensor, update: int, first: int, count: int) -> None:
    """Keep what is not a number out of the sums, which would stay spoiled for good."""
    if not x.isfinite().all():
        position = f"calibration sequences {first} to {first + count - 1}"
        remedy = "the checkpoint before it is kept; use dtype float32, or another hook_point"
        raise Diverged(update + 1, "activations", position, remedy)


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


def _require_calibration_of(
    directory: Path, theirs: dict[str, Any], config: RunConfig, sources: Sources
) -> None:
    ours = fingerprint(calibration_settings(config), sources.inputs())
    # More held-out tokens than asked for are welcome: cells of a sweep share one calibration.
    if theirs.get("evaluate.tokens", 0) >= ours["evaluate.tokens"]:
        ours["evaluate.tokens"] = theirs["evaluate.tokens"]
    if differing := differences(theirs, ours):
        remedy = f"is of another run: {differing}; calibrate again, or go back to its settings"
        raise UserError("calibration", str(directory), remedy)


def load_calibration(directory: Path, config: RunConfig, device: torch.device) -> Calibration:
    """Read what `calibrate` wrote.

    Raises:
        UserError: a file is missing or damaged, or belongs to another model, site or dataset; the
            differing fields are listed.
    """
    checkpoint = read_checkpoint(directory, device)
    metadata = checkpoint.metadata
    sources = find_sources(config, metadata.get("sources"))
    _require_calibration_of(directory, metadata.get("fingerprint", {}), config, sources)
    tensors, measured = checkpoint.tensors["calibration"], metadata["measured"]
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
        token_ids=tensors["token_ids"],
        covariance=tensors["covariance"],
        fisher=tensors["fisher"],
        measured=measured,
        digests=dict(metadata["digests"]),
        sources=sources,
    )
