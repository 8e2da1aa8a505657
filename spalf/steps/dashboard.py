"""The dashboard step: one page to look at the features of one SAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from spalf.checkpoint import read_checkpoint
from spalf.config import RANDOM, RunConfig
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
from spalf.interchange import SAELensSAE, is_saelens_folder
from spalf.interchange.saelens import WEIGHTS_FILE
from spalf.models import LanguageModel, load_tokenizer
from spalf.report.records import read_evaluation, read_frontier, read_metrics
from spalf.sae import StratifiedSAE
from spalf.steps.calibrate import Calibration, load_calibration
from spalf.steps.context import StepContext, exclusive
from spalf.steps.subjects import read_trained, require_width
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
        phases: checkpoint directory of each phase, in order, with its metrics log; or, as the
            single phase ``sae``, a baseline or any other SAE in SAELens's format.
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
    shown = _read(directory, config, context.device)
    cell = _cell(config, shown, model_label, variant)
    log = [row for path in phases.values() for row in _metrics_log(path, shown)]
    metrics, sweep = _measured(evaluation, phase, cell) if evaluation else ({}, [])
    beside = _beside(frontier, cell) if frontier else []
    inputs = OverviewInputs(cell, phase, metrics, sweep, beside, log)
    with exclusive(out, context):
        pinned = known.sources.pinned(config)
        model = context.load_model(pinned)
        require_width(shown.coder, model, directory)
        tokenizer = load_tokenizer(
            pinned.model_name,
            revision=pinned.revision,
            trust_remote_code=pinned.trust_remote_code,
        )
        data = _features(config, known, shown, model, len(tokenizer), context)
        summary = overview(
            inputs,
            data.statistics.fired.cpu().numpy(),
            data.threshold,
            len(shown.anchors),
            data.statistics.tokens,
        )
        page = build_page(
            _title(inputs.cell),
            summary,
            data,
            lambda ids: token_strings(tokenizer, ids),
            _provenance(config, shown),
        )
        write_page(out, page)


@dataclass(frozen=True)
class _Shown:
    """The SAE that a page is about.

    Attributes:
        coder: the SAE.
        method: what trained it, as in tables.
        anchors: initial directions of its anchored features, ``[n_anchored, d_model]``.
        scale: length that one unit of decoder output stands for.
        origin: which file it was read from, in words.
    """

    coder: StratifiedSAE | SAELensSAE
    method: str
    anchors: Tensor
    scale: float
    origin: str

    @property
    def threshold(self) -> Tensor:
        """θ, ``[d_sae]``."""
        return self.coder.threshold.detach()

    @property
    def has_thresholds(self) -> bool:
        """Whether θ says when a feature is active."""
        return not isinstance(self.coder, SAELensSAE) or self.coder.has_thresholds


def _read(directory: Path, config: RunConfig, device: torch.device) -> _Shown:
    """The SAE of a phase, of a baseline, or of a SAELens folder."""
    if is_saelens_folder(directory):
        found = read_trained(directory, config, device)
        origin = f"SAE {directory.name}, {WEIGHTS_FILE} {found.digests[WEIGHTS_FILE][:12]}"
        none = found.coder.W_dec[:0]
        return _Shown(found.coder, found.method, none, 1.0, f"{origin} · {found.method}")
    checkpoint = read_checkpoint(directory, device, ("model", "tensors"))
    sae = load_sae(checkpoint, config, device).eval()
    made, digests = checkpoint.metadata.get("environment", {}), checkpoint.metadata["digests"]
    by = f"trained with spalf {made.get('spalf', '?')} {made.get('commit', '')}".rstrip()
    file = "model.safetensors"
    origin = f"SAE {directory.name}, {file} {digests[file][:12]} · {by}"
    return _Shown(sae, "spalf", sae.anchors, sae.scale, origin)


def _features(
    config: RunConfig,
    known: Calibration,
    shown: _Shown,
    model: LanguageModel,
    n_tokens: int,
    context: StepContext,
) -> FeatureData:
    statistics, contexts, sequences = _pass(config, known.splits.evaluation, shown, model, context)
    W_dec, threshold = shown.coder.W_dec, shown.threshold
    with torch.no_grad():
        effects = token_effects(W_dec * shown.scale, model.unembedding(), n_tokens, EFFECTS)
        near, cosine = nearest_features(W_dec, NEAREST)
        distance, to_anchor = anchor_drift(W_dec, shown.anchors)
    if not shown.has_thresholds:
        threshold = torch.full_like(threshold, torch.nan)
    return FeatureData(
        statistics=statistics,
        contexts=contexts,
        sequences=sequences,
        threshold=threshold.cpu().numpy(),
        effects=effects,
        nearest=(near.cpu().numpy(), cosine.cpu().numpy()),
        anchor_tokens=known.token_ids[: len(shown.anchors)].cpu().numpy(),
        drift=(distance.cpu().numpy(), to_anchor.cpu().numpy()),
    )


def _pass(
    config: RunConfig,
    stream: SequenceStream,
    shown: _Shown,
    model: LanguageModel,
    context: StepContext,
) -> tuple[Any, Any, NDArray[np.int32]]:
    """Statistics and contexts from one pass over held-out tokens, and these tokens."""
    collector = Collector(shown.coder, shown.threshold, stream.seq_len)
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


def _cell(
    config: RunConfig, shown: _Shown, model_label: str | None, variant: str
) -> dict[str, Any]:
    names = ("model_name", "hook_point", "L0_target", "seed")
    own = {name: getattr(config, name) for name in names} | {"F": shown.coder.d_sae}
    label = model_label or config.model_name
    return {"model": label, "method": shown.method, "variant": variant, **own}


def _metrics_log(phase: Path, shown: _Shown) -> list[dict[str, Any]]:
    if isinstance(shown.coder, SAELensSAE):
        return []
    return _records(read_metrics(phase / "metrics.jsonl"))


def _beside(frontier: Path, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the frontier that are of the same model and site."""
    table = read_frontier(frontier)
    table = table[table["method"] != RANDOM]  # so far off that nothing else would be seen
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
    for name in ("model_name", "hook_point", "method", "variant", "L0_target", "seed", "F"):
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
    kind = f"{cell['method']} {cell['variant']}".strip()
    parts = [cell["model"], cell["hook_point"], *([] if kind == "spalf" else [kind])]
    return " · ".join([*parts, f"L0 {cell['L0_target']:g}", f"seed {cell['seed']}"])


def _provenance(config: RunConfig, shown: _Shown) -> str:
    parts = [
        f"{config.model_name}, {config.hook_point}",
        f"dataset {config.dataset.path}",
        shown.origin,
        f"page by spalf {version('spalf')}",
    ]
    return " · ".join(parts)
