"""The dashboard step: one page to look at the features of one SAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from spalf.checkpoint import Checkpoint, read_checkpoint
from spalf.config import RunConfig
from spalf.dashboard import (
    Collector,
    FeatureData,
    OverviewInputs,
    anchor_drift,
    build_page,
    nearest_features,
    overview,
    token_effects,
    token_strings,
    write_page,
)
from spalf.data import SequenceStream
from spalf.errors import Interrupted, StopRequested, UserError
from spalf.models import LanguageModel, load_tokenizer
from spalf.report.records import read_evaluation, read_frontier, read_metrics
from spalf.sae import StratifiedSAE
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import StepContext, exclusive
from spalf.training.state import load_sae

MAX_TOKENS = 2**20
"""Held-out tokens looked at, at most: what the page holds of them stays a few MB."""

SEQUENCES_PER_BATCH = 8
EFFECTS, NEAREST = 10, 8
"""Promoted and suppressed tokens, and nearest features, of each feature."""


def dashboard(
    config: RunConfig,
    calibration: Path,
    phases: Mapping[str, Path],
    out: Path,
    context: StepContext,
    *,
    evaluation: Path | None = None,
    frontier: Path | None = None,
    model_label: str | None = None,
    variant: str = "",
) -> None:
    """Write the page of the last phase's SAE to ``out``; equal inputs give equal bytes.

    Args:
        config: the run; its first ``config.evaluate.tokens`` held-out tokens, as evaluation draws
            them, are looked at, at most `MAX_TOKENS`.
        calibration: its calibration directory.
        phases: checkpoint directory of each phase, in order, with its metrics log.
        out: the HTML file to write.
        context: device, progress.
        evaluation: ``evaluation.json`` of the SAE.
        frontier: ``frontier.csv`` of the sweep.
        model_label: short name of the model; by default the model's own name.
        variant: name of the variant of the method in tables, where it is one.

    Raises:
        UserError: an input is missing or damaged.
        Interrupted: asked to stop; nothing was written.
        Busy: another process is at work on ``out``.
    """
    known = load_calibration(calibration, config, context.device)
    phase, directory = list(phases.items())[-1]
    checkpoint = read_checkpoint(directory, context.device, ("model", "tensors"))
    sae = load_sae(checkpoint, config, context.device).eval()
    cell = _cell(config, model_label, variant)
    log = [row for path in phases.values() for row in _metrics_log(path)]
    metrics, sweep = _measured(evaluation, phase, cell) if evaluation else ({}, [])
    beside = _beside(frontier, cell) if frontier else []
    inputs = OverviewInputs(cell, phase, metrics, sweep, beside, log)
    with exclusive(out, context):
        pinned = known.sources.pinned(config)
        model = context.load_model(pinned)
        tokenizer = load_tokenizer(
            pinned.model_name,
            revision=pinned.revision,
            trust_remote_code=pinned.trust_remote_code,
        )
        data = _features(config, known, sae, model, len(tokenizer), context)
        summary = overview(
            inputs,
            data.statistics.fired.cpu().numpy(),
            data.threshold,
            sae.n_anchored,
            data.statistics.tokens,
        )
        page = build_page(
            _title(inputs.cell),
            summary,
            data,
            lambda ids: token_strings(tokenizer, ids),
            _provenance(config, checkpoint, directory),
        )
        write_page(out, page)


def _features(
    config: RunConfig,
    known: Calibration,
    sae: StratifiedSAE,
    model: LanguageModel,
    n_tokens: int,
    context: StepContext,
) -> FeatureData:
    statistics, contexts, sequences = _pass(config, known.splits.evaluation, sae, model, context)
    with torch.no_grad():
        effects = token_effects(sae.W_dec * sae.scale, model.unembedding(), n_tokens, EFFECTS)
        near, cosine = nearest_features(sae.W_dec, NEAREST)
        distance, to_anchor = anchor_drift(sae.W_dec, sae.anchors)
    return FeatureData(
        statistics=statistics,
        contexts=contexts,
        sequences=sequences,
        threshold=sae.threshold.detach().cpu().numpy(),
        effects=effects,
        nearest=(near.cpu().numpy(), cosine.cpu().numpy()),
        anchor_tokens=known.token_ids[: sae.n_anchored].cpu().numpy(),
        drift=(distance.cpu().numpy(), to_anchor.cpu().numpy()),
    )


def _pass(
    config: RunConfig,
    stream: SequenceStream,
    sae: StratifiedSAE,
    model: LanguageModel,
    context: StepContext,
) -> tuple[Any, Any, NDArray[np.int32]]:
    """Statistics and contexts from one pass over held-out tokens, and these tokens."""
    collector = Collector(sae, sae.threshold.detach(), stream.seq_len)
    wanted = min(config.evaluate.tokens, MAX_TOKENS, stream.n_sequences * stream.seq_len)
    progress = context.progress("dashboard", wanted, 0)
    seen = []
    try:
        for tokens in _held_out(stream, wanted, context):
            collector.add(model.activations(tokens.to(context.device)))
            seen.append(tokens.numpy().astype(np.int32))
            progress.update(tokens.numel())
    except StopRequested:
        raise Interrupted(0, "page") from None
    finally:
        progress.close()
    return collector.statistics(), collector.contexts(), np.concatenate(seen)


def _held_out(stream: SequenceStream, tokens: int, context: StepContext) -> Iterator[Tensor]:
    """The held-out sequences that evaluation measures on, in its order."""
    sequences = -(-tokens // stream.seq_len)
    for start in range(0, sequences, SEQUENCES_PER_BATCH):
        context.pause_point()
        yield stream.sequences(start, min(SEQUENCES_PER_BATCH, sequences - start), seed=0)


def _cell(config: RunConfig, model_label: str | None, variant: str) -> dict[str, Any]:
    names = ("model_name", "hook_point", "L0_target", "seed", "F")
    own = {name: getattr(config, name) for name in names}
    return {"model": model_label or config.model_name, "variant": variant, **own}


def _metrics_log(phase: Path) -> list[dict[str, Any]]:
    return _records(read_metrics(phase / "metrics.jsonl"))


def _beside(frontier: Path, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the frontier that are of the same model and site."""
    table = read_frontier(frontier)
    same = (table["model"] == cell["model"]) & (table["hook_point"] == cell["hook_point"])
    return _records(table[same])


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _measured(
    path: Path, phase: str, cell: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The phase's metrics and, where they are of this SAE, the threshold sweep.

    Raises:
        UserError: the file is damaged, or of another SAE.
    """
    read = read_evaluation(path)
    for name in ("model_name", "hook_point", "variant", "L0_target", "seed", "F"):
        there = getattr(read.cell, name)
        if there != cell[name]:
            remedy = f"is of another SAE: its {name} is {there}; give the one of this run"
            raise UserError("--evaluation", str(path), remedy)
    if phase not in read.phases:
        remedy = f"has no measurements of {phase}; evaluate it first"
        raise UserError("--evaluation", str(path), remedy)
    content = json.loads(path.read_text(encoding="utf-8"))
    sweep = content.get("threshold_sweep", []) if read.final == phase else []
    return read.phases[phase].model_dump(), sweep


def _title(cell: Mapping[str, Any]) -> str:
    return (
        f"{cell['model']} · {cell['hook_point']} · L0 {cell['L0_target']:g} · seed {cell['seed']}"
    )


def _provenance(config: RunConfig, checkpoint: Checkpoint, directory: Path) -> str:
    made = checkpoint.metadata.get("environment", {})
    parts = [
        f"{config.model_name}, {config.hook_point}",
        f"dataset {config.dataset.path}",
        f"SAE {directory.name}, model.safetensors "
        f"{checkpoint.metadata['digests']['model.safetensors'][:12]}",
        f"trained with spalf {made.get('spalf', '?')} {made.get('commit', '')}".rstrip(),
        f"page by spalf {version('spalf')}",
    ]
    return " · ".join(parts)
