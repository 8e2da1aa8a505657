"""The evaluate step: Phase 1's and Phase 2's SAE on held-out tokens, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.checkpoint import Checkpoint, read_checkpoint
from spalf.config import RunConfig
from spalf.data import SequenceStream
from spalf.evaluation import (
    anchor_drift,
    control_summary,
    evaluate_absorption,
    evaluate_downstream,
    threshold_sweep,
)
from spalf.models import LanguageModel, load_tokenizer
from spalf.sae import StratifiedSAE
from spalf.steps.calibrate import load_calibration
from spalf.steps.context import StepContext, environment, exclusive, write_json
from spalf.training.state import load_sae

SEQUENCES_PER_BATCH = 16


def evaluate(
    config: RunConfig,
    calibration: Path,
    phases: Mapping[str, Path],
    out: Path,
    context: StepContext,
    model_label: str | None = None,
) -> None:
    """Measure the SAE of each phase and write ``evaluation.json``.

    Args:
        config: the run; ``config.evaluate`` says on how many tokens.
        calibration: its calibration directory, which holds the held-out tokens.
        phases: checkpoint directory of each phase, in order; the last is the final SAE.
        out: the JSON file to write.
        context: device, progress.
        model_label: short name of the model in tables; by default the model's own name.

    Raises:
        UserError: an input is missing or damaged.
    """
    known = load_calibration(calibration, config, context.device)
    checkpoints = {name: read_checkpoint(path, context.device) for name, path in phases.items()}
    saes = {name: load_sae(c, config, context.device).eval() for name, c in checkpoints.items()}
    final = list(phases)[-1]
    model = context.load_model(config)
    stream = known.splits.evaluation
    with exclusive(out.with_name(f"{out.stem}.checkpoints")):
        report: dict[str, Any] = {
            "cell": _cell(config, model_label),
            "environment": environment(context),
            "phases": _phases(config, model, saes, checkpoints, stream, context),
            "final": final,
            "threshold_sweep": _sweep(config, model, saes[final], stream, context),
            "drift": anchor_drift(saes[final].W_dec, saes[final].anchors),
            "controller": {
                name: {**control_summary(_rows(path), index), "ended_by": _ended(checkpoints[name])}
                for index, (name, path) in enumerate(phases.items(), start=1)
            },
        }
        if config.evaluate.absorption:
            report["absorption"] = _absorption(config, model, saes[final], stream, context)
        else:
            report["absorption"] = {"skipped": "evaluate.absorption is false"}
        write_json(out, report)


def _phases(
    config: RunConfig,
    model: LanguageModel,
    saes: Mapping[str, StratifiedSAE],
    checkpoints: Mapping[str, Checkpoint],
    stream: SequenceStream,
    context: StepContext,
) -> dict[str, Any]:
    tokens = config.evaluate.tokens
    progress = context.progress("evaluate", min(tokens, _available(stream)), 0)
    measured = evaluate_downstream(
        model, saes, _held_out(stream, tokens, context.device), progress=progress.update
    )
    progress.close()
    rows = {}
    for name, metrics in measured.items():
        trained = checkpoints[name].metadata["state"]["step"] * config.batch_size
        multiplier = float(checkpoints[name].tensors["control"]["law.multiplier"][0])
        rows[name] = metrics.summary() | {"lambda_faith": multiplier, "train_tokens": trained}
    return rows


def _sweep(
    config: RunConfig,
    model: LanguageModel,
    sae: StratifiedSAE,
    stream: SequenceStream,
    context: StepContext,
) -> list[dict[str, float]]:
    sequences = _held_out(stream, config.evaluate.sweep_tokens, context.device)
    return threshold_sweep(model, sae, sequences, config.evaluate.sweep_factors)


def _absorption(
    config: RunConfig,
    model: LanguageModel,
    sae: StratifiedSAE,
    stream: SequenceStream,
    context: StepContext,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(
        config.model_name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sequences = _held_out(stream, config.evaluate.tokens, context.device)
    return evaluate_absorption(model, sae, sequences, strings)


def _held_out(stream: SequenceStream, tokens: int, device: torch.device) -> Iterator[Tensor]:
    """A fixed random choice of ``tokens`` held-out tokens, the same for every SAE, none twice."""
    wanted = min(-(-tokens // stream.seq_len), stream.n_sequences)
    for start in range(0, wanted, SEQUENCES_PER_BATCH):
        count = min(SEQUENCES_PER_BATCH, wanted - start)
        yield stream.sequences(start, count, seed=0).to(device)


def _available(stream: SequenceStream) -> int:
    return stream.n_sequences * stream.seq_len


def _cell(config: RunConfig, label: str | None) -> dict[str, Any]:
    return {
        "model": label or config.model_name,
        "model_name": config.model_name,
        "hook_point": config.hook_point,
        "method": "spalf",
        "L0_target": config.L0_target,
        "R2_target": config.R2_target,
        "F": config.F,
        "seed": config.seed,
    }


def _rows(directory: Path) -> list[dict[str, float]]:
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _ended(checkpoint: Checkpoint) -> str:
    return str(checkpoint.metadata["state"]["ended_by"])
