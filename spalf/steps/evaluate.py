"""The evaluate step: Phase 1's and Phase 2's SAE on held-out tokens, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spalf.checkpoint import (
    Checkpoint,
    CheckpointStore,
    fingerprint,
    identity_digest,
    read_checkpoint,
)
from spalf.config import RunConfig
from spalf.data import SequenceStream
from spalf.errors import Interrupted, StopRequested
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
from spalf.steps.context import (
    StepContext,
    environment,
    exclusive,
    finished,
    training_settings,
    write_json,
)
from spalf.training.state import load_sae

SEQUENCES_PER_BATCH = 8


def evaluate(
    config: RunConfig,
    calibration: Path,
    phases: Mapping[str, Path],
    out: Path,
    context: StepContext,
    model_label: str | None = None,
) -> None:
    """Measure the SAE of each phase and write ``evaluation.json``.

    Each part of the report is kept in ``<out>.checkpoints`` as soon as it is measured, so an
    interrupted evaluation repeats one part at most.

    Args:
        config: the run; ``config.evaluate`` says on how many tokens.
        calibration: its calibration directory, which holds the held-out tokens.
        phases: checkpoint directory of each phase, in order; the last is the final SAE.
        out: the JSON file to write.
        context: device, progress.
        model_label: short name of the model in tables; by default the model's own name.

    Raises:
        UserError: an input is missing or damaged.
        Interrupted: asked to stop; the parts measured so far are kept.
        Busy: another process is at work on ``out``.
    """
    known = load_calibration(calibration, config, context.device)
    checkpoints = {name: read_checkpoint(path, context.device) for name, path in phases.items()}
    inputs = {name: c.metadata["digests"] for name, c in checkpoints.items()}
    settings = {**training_settings(config), "evaluate": config.evaluate.model_dump(mode="json")}
    settings |= {"label": model_label, "final": list(phases)[-1]}
    identity = fingerprint(settings, {"calibration": known.digests, **inputs})
    with exclusive(out, context) as working:
        if _finished(out, identity, context):
            return
        store = CheckpointStore(working, identity, context.if_foreign)
        saved = store.latest("cpu")
        subject = _Subject(
            config=config,
            model=context.load_model(config),
            saes={n: load_sae(c, config, context.device).eval() for n, c in checkpoints.items()},
            checkpoints=checkpoints,
            stream=known.splits.evaluation,
            context=context,
        )
        report: dict[str, Any] = {
            "cell": _cell(config, model_label),
            "environment": environment(context),
            "fingerprint": identity_digest(identity),
            **_measured(subject, store, dict(saved.metadata["parts"]) if saved else {}),
            "final": list(phases)[-1],
            "controller": {
                name: _controller(_rows(path), checkpoints[name]) for name, path in phases.items()
            },
        }
        write_json(out, report)


@dataclass(frozen=True)
class _Subject:
    """What is measured, and on what.

    Attributes:
        config: the run.
        model: its language model.
        saes: the SAE of each phase, the final one last.
        checkpoints: what they were loaded from.
        stream: held-out sequences.
        context: device, progress.
    """

    config: RunConfig
    model: LanguageModel
    saes: Mapping[str, StratifiedSAE]
    checkpoints: Mapping[str, Checkpoint]
    stream: SequenceStream
    context: StepContext

    @property
    def final(self) -> StratifiedSAE:
        return list(self.saes.values())[-1]

    def held_out(self, tokens: int) -> Iterator[Tensor]:
        """A fixed random choice of ``tokens`` held-out tokens, the same for every SAE."""
        wanted = min(-(-tokens // self.stream.seq_len), self.stream.n_sequences)
        for start in range(0, wanted, SEQUENCES_PER_BATCH):
            self.context.pause_point()
            count = min(SEQUENCES_PER_BATCH, wanted - start)
            yield self.stream.sequences(start, count, seed=0).to(self.context.device)


def _measured(subject: _Subject, store: CheckpointStore, parts: dict[str, Any]) -> dict[str, Any]:
    """Every part of the report that needs the SAE, those in ``parts`` from an earlier attempt."""
    for name, measure in _PARTS.items():
        if name in parts:
            continue
        try:
            # As it will be read back, so that a resumed report is the same byte for byte.
            parts[name] = json.loads(json.dumps(measure(subject)))
        except StopRequested:
            raise Interrupted(len(parts), "part") from None
        store.save(len(parts), Checkpoint({}, {"parts": parts}))
    return {name: parts[name] for name in _PARTS}


def _finished(out: Path, identity: Mapping[str, Any], context: StepContext) -> bool:
    try:
        theirs = json.loads(out.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    ours = identity_digest(identity)
    return theirs == ours and finished(out, {"fingerprint": theirs}, {"fingerprint": ours}, context)


def _phases(subject: _Subject) -> dict[str, Any]:
    config, stream = subject.config, subject.stream
    tokens = config.evaluate.tokens
    progress = subject.context.progress("evaluate", min(tokens, _available(stream)), 0)
    try:
        measured = evaluate_downstream(
            subject.model, subject.saes, subject.held_out(tokens), progress=progress.update
        )
    finally:
        progress.close()
    rows = {}
    for name, metrics in measured.items():
        checkpoint = subject.checkpoints[name]
        trained = checkpoint.metadata["state"]["step"] * config.batch_size
        multiplier = float(checkpoint.tensors["control"]["law.multiplier"][0])
        rows[name] = metrics.summary() | {"lambda_faith": multiplier, "train_tokens": trained}
    return rows


def _sweep(subject: _Subject) -> list[dict[str, float]]:
    chosen = subject.config.evaluate
    sequences = subject.held_out(chosen.sweep_tokens)
    return threshold_sweep(subject.model, subject.final, sequences, chosen.sweep_factors)


def _drift(subject: _Subject) -> dict[str, Any]:
    return dict(anchor_drift(subject.final.W_dec, subject.final.anchors))


def _absorption(subject: _Subject) -> dict[str, Any]:
    config = subject.config
    if not config.evaluate.absorption:
        return {"skipped": "evaluate.absorption is false"}
    tokenizer = load_tokenizer(
        config.model_name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sequences = subject.held_out(config.evaluate.tokens)
    return evaluate_absorption(subject.model, subject.final, sequences, strings)


_PARTS: dict[str, Callable[[_Subject], Any]] = {
    "phases": _phases,
    "threshold_sweep": _sweep,
    "drift": _drift,
    "absorption": _absorption,
}


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


def _controller(rows: list[dict[str, float]], checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.metadata["state"]
    return {**control_summary(rows, state["phase"]), "ended_by": state["ended_by"]}
