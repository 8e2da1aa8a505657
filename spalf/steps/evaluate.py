"""The evaluate step: SAEs on held-out tokens, those of both phases side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spalf.checkpoint import (
    Checkpoint,
    CheckpointStore,
    fingerprint,
    identity_digest,
)
from spalf.config import RunConfig
from spalf.data import SequenceStream
from spalf.errors import Diverged, Interrupted, StopRequested
from spalf.evaluation import (
    PROBED_TOKENS,
    AbsorptionMeasurement,
    DownstreamMeasurement,
    Measurement,
    ProbingMeasurement,
    ThresholdSweep,
    TokenLabels,
    anchor_drift,
    decoder_cosines,
    encoder,
    label_tokens,
)
from spalf.evaluation.source_labels import Encode
from spalf.interchange import SAELensSAE
from spalf.models import LanguageModel, load_tokenizer
from spalf.report.records import evaluation_digest
from spalf.sae import StratifiedSAE
from spalf.steps.calibrate import load_calibration
from spalf.steps.context import (
    CheckpointClock,
    StepContext,
    environment,
    exclusive,
    finished,
    training_settings,
    write_json,
)
from spalf.steps.keep import keep_finished, restore_finished
from spalf.steps.subjects import TrainedSAE, read_trained, require_width

logger = logging.getLogger(__name__)

SEQUENCES_PER_BATCH = 8
GPU_BATCH_ELEMENTS = 2**25
"""Logits, or codes, of a batch on a GPU, where that makes more sequences than on a CPU."""
CHECK_EVERY = 16
"""Batches between two looks at whether everything gathered is finite."""

_COSINES = 2**25
"""Cosines between decoder columns held at a time: 128 MiB."""


def evaluate(
    config: RunConfig,
    calibration: Path,
    phases: Mapping[str, Path],
    out: Path,
    context: StepContext,
    model_label: str | None = None,
    variant: str = "",
) -> None:
    """Measure the SAE of each phase, or one in SAELens's format, and write ``evaluation.json``.

    Resumes from ``<out>.checkpoints``, which holds the parts of the report that are measured and
    the running sums of the one that is not.

    Args:
        config: the run; ``config.evaluate`` says on how many tokens.
        calibration: its calibration directory, which holds the held-out tokens.
        phases: directory of each phase, in order; the last is the final SAE. A baseline, or any
            other SAE of SAELens, is the single phase ``sae``.
        out: the JSON file to write.
        context: device, progress.
        model_label: short name of the model in tables; by default the model's own name.
        variant: name of the variant of the method in tables, where it is one.

    Raises:
        UserError: an input is missing or damaged.
        Interrupted: asked to stop; a checkpoint was written.
        Diverged: what was measured is not finite; the last checkpoint is kept.
        Busy: another process is at work on ``out``.
    """
    with context.nothing_to_lose():
        known = load_calibration(calibration, config, context.device)
        saes = {name: read_trained(path, config, context.device) for name, path in phases.items()}
    inputs: dict[str, Any] = {name: dict(sae.digests) for name, sae in saes.items()}
    inputs |= known.sources.inputs()
    settings = {**training_settings(config), "evaluate": config.evaluate.model_dump(mode="json")}
    settings |= {"label": model_label, "final": list(phases)[-1]}
    settings |= {"variant": variant} if variant else {}
    settings |= {"parts": list(_PARTS)}  # a report of fewer parts is another report
    identity = fingerprint(settings, {"calibration": known.digests, **inputs})
    with exclusive(out, context) as working:
        if _finished(out, identity, context):
            return
        store = CheckpointStore(working, identity, context.if_foreign)
        subject = _Subject(
            config=known.sources.pinned(config),
            model=context.load_model(known.sources.pinned(config)),
            saes=saes,
            stream=known.splits.evaluation,
            context=context,
        )
        for name, sae in saes.items():
            require_width(sae.coder, subject.model, phases[name])
        report: dict[str, Any] = {
            "cell": _cell(config, subject.final, model_label, variant),
            "environment": environment(context),
            "settings": settings,
            "inputs": {"calibration": known.digests, **inputs},
            "fingerprint": identity_digest(identity),
            **_Measuring(subject, store).run(),
            "final": list(phases)[-1],
            "controller": {name: sae.control for name, sae in saes.items()},
        }
        write_json(out, {**report, "digest": evaluation_digest(report)})
        keep_finished(out, identity, context)


@dataclass(frozen=True)
class _Subject:
    """What is measured, and on what.

    Attributes:
        config: the run.
        model: its language model.
        saes: the SAE of each phase, the final one last.
        stream: held-out sequences.
        context: device, progress.
    """

    config: RunConfig
    model: LanguageModel
    saes: Mapping[str, TrainedSAE]
    stream: SequenceStream
    context: StepContext

    @property
    def final(self) -> TrainedSAE:
        return list(self.saes.values())[-1]

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's."""
        config = self.config
        return load_tokenizer(
            config.model_name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )

    @property
    def sequences_per_batch(self) -> int:
        """So many that a GPU is not idle while the host launches its kernels."""
        if self.model.device.type == "cpu":
            return SEQUENCES_PER_BATCH
        widest = max(self.model.d_vocab, *(sae.coder.d_sae for sae in self.saes.values()))
        return max(SEQUENCES_PER_BATCH, GPU_BATCH_ELEMENTS // (widest * self.stream.seq_len))

    @property
    def available(self) -> int:
        """Held-out tokens there are."""
        return self.stream.n_sequences * self.stream.seq_len


class _Measuring:
    """The parts of the report, one after the other; can be left and taken up after any batch.

    Args:
        subject: what is measured.
        store: its checkpoints.
    """

    def __init__(self, subject: _Subject, store: CheckpointStore) -> None:
        runtime = subject.config.runtime
        self._subject, self._store = subject, store
        self._clock = CheckpointClock(
            runtime.checkpoint_every_minutes, runtime.checkpoint_every_steps
        )
        saved = store.latest("cpu")
        state: Mapping[str, Any] = saved.metadata if saved else {}
        self._parts: dict[str, Any] = dict(state.get("parts", {}))
        self._done, self._position = state.get("done", 0), state.get("position", 0)
        self._tensors = saved.tensors.get("measurement", {}) if saved else {}
        if saved:
            logger.info("resuming evaluation after %d batches", self._done)

    def run(self) -> dict[str, Any]:
        """Every part that needs the SAE, by name."""
        for name, part in _PARTS.items():
            if name in self._parts:
                continue
            with self._subject.context.nothing_to_lose():
                tokens, measurement = part(self._subject)
                measurement.load_state_dict(self._tensors)
            self._run_part(name, min(tokens, self._subject.available), measurement)
            with self._subject.context.nothing_to_lose():
                # As it will be read back, so that a resumed report is the same byte for byte.
                self._parts[name] = json.loads(json.dumps(measurement.result()))
            self._position, self._tensors = 0, {}
        return {name: self._parts[name] for name in _PARTS}

    def _run_part(self, name: str, tokens: int, measurement: Measurement) -> None:
        stream, context = self._subject.stream, self._subject.context
        wanted, checked = -(-tokens // stream.seq_len), self._position
        if self._position >= wanted:
            return
        label = "evaluate" if name == "phases" else f"evaluate, {name.replace('_', ' ')}"
        progress = context.progress(label, tokens, self._position * stream.seq_len)
        try:
            while self._position < wanted:
                context.pause_point()
                count = min(self._subject.sequences_per_batch, wanted - self._position)
                # A fixed random choice of held-out tokens, the same for every SAE.
                measurement.add(stream.sequences(self._position, count, seed=0).to(context.device))
                self._position += count
                self._done += 1
                progress.update(count * stream.seq_len)
                due = self._clock.due(self._done) or self._position >= wanted
                if due or self._done % CHECK_EVERY == 0:
                    self._require_finite(measurement, checked)
                    checked = self._position
                if due:
                    with self._clock.timed():
                        self._save(measurement)
        except StopRequested:
            self._require_finite(measurement, checked)
            self._save(measurement)
            raise Interrupted(self._done, "batch") from None
        finally:
            progress.close()

    def _require_finite(self, measurement: Measurement, first: int) -> None:
        for name, tensor in measurement.state_dict().items():
            if not tensor.isfinite().all():
                position = f"held-out sequences {first} to {self._position - 1}"
                remedy = "the checkpoint before it is kept; look at the SAE, or use dtype float32"
                raise Diverged(self._done, f"measured {name}", position, remedy)

    def _save(self, measurement: Measurement) -> None:
        metadata = {"parts": self._parts, "done": self._done, "position": self._position}
        self._store.save(
            self._done, Checkpoint({"measurement": measurement.state_dict()}, metadata)
        )


def _finished(out: Path, identity: Mapping[str, Any], context: StepContext) -> bool:
    restore_finished(out, identity)
    try:
        there = json.loads(out.read_text(encoding="utf-8"))
        theirs, whole = there["fingerprint"], there["digest"] == evaluation_digest(there)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not whole:
        logger.warning("making %s again: it does not match its digest", out)
        return False
    ours = identity_digest(identity)
    return theirs == ours and finished(out, {"fingerprint": theirs}, {"fingerprint": ours}, context)


class _Phases(DownstreamMeasurement):
    """Downstream metrics of each phase's SAE, with what its training adds to the row."""

    def __init__(self, subject: _Subject) -> None:
        super().__init__(subject.model, {name: sae.coder for name, sae in subject.saes.items()})
        self._saes = subject.saes

    def result(self) -> dict[str, dict[str, float | int | None]]:
        """One row for each phase."""
        rows = super().result()
        for name, row in rows.items():
            row["lambda_faith"] = self._saes[name].multiplier
            row["train_tokens"] = self._saes[name].train_tokens
        return rows


@dataclass(frozen=True)
class _AtOnce:
    """A part of the report that reads no tokens."""

    value: Any

    def add(self, sequences: Tensor) -> None:
        """Nothing to take in."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def result(self) -> Any:
        """The value."""
        return self.value


Part = tuple[int, Measurement]
"""How many tokens a part of the report is measured on, and the measurement."""


def _phases(subject: _Subject) -> Part:
    return subject.config.evaluate.tokens, _Phases(subject)


def _sweep(subject: _Subject) -> Part:
    chosen, coder = subject.config.evaluate, subject.final.coder
    if isinstance(coder, SAELensSAE) and not coder.has_thresholds:
        return 0, _AtOnce([])
    sweep = ThresholdSweep(subject.model, coder, chosen.sweep_factors)
    return chosen.sweep_tokens, sweep


def _drift(subject: _Subject) -> Part:
    coder = subject.final.coder
    if not isinstance(coder, StratifiedSAE):
        return 0, _AtOnce({"skipped": "no column is anchored"})
    return 0, _AtOnce(dict(anchor_drift(coder.W_dec, coder.anchors)))


def _absorption(subject: _Subject) -> Part:
    config = subject.config
    if not config.evaluate.absorption:
        return 0, _AtOnce({"skipped": "evaluate.absorption is false"})
    tokenizer = subject.tokenizer
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    coder = subject.final.coder
    return config.evaluate.tokens, AbsorptionMeasurement(subject.model, coder, strings)


def _probing(subject: _Subject) -> Part:
    chosen = subject.config.evaluate
    if not chosen.probing:
        return 0, _AtOnce({"skipped": "evaluate.probing is false"})
    encode = encoder(subject.tokenizer)
    if encode is None:
        reason = "the model's tokenizer does not say which characters a token stands for"
        return 0, _AtOnce({"skipped": reason})
    tokens = min(PROBED_TOKENS, chosen.tokens)
    labels = _labels(subject, encode, tokens)
    if not (labels.document >= 0).any():
        return 0, _AtOnce({"skipped": "no document of the evaluation text is Python source"})
    measurement = ProbingMeasurement(subject.model, subject.final.coder, subject.stream, labels)
    return tokens, measurement


def _labels(subject: _Subject, encode: Encode, count: int) -> TokenLabels:
    """Labels of at least the first ``count`` held-out tokens that a measurement is given."""
    stream, tokenizer = subject.stream, subject.tokenizer
    tokens = stream.sequences(0, stream.n_sequences).flatten().numpy()
    wanted = np.zeros((stream.n_sequences, stream.seq_len), dtype=np.bool_)
    index = np.arange(stream.n_sequences)[:, None]
    some = min(-(-count // stream.seq_len), stream.n_sequences)
    wanted[SequenceStream(index).sequences(0, some, seed=0).flatten()] = True
    separators = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return label_tokens(
        tokens,
        [token for token in separators if token is not None],
        lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        encode,
        wanted.flatten(),
    )


def _decoder(subject: _Subject) -> Part:
    W_dec = subject.final.coder.W_dec
    return 0, _AtOnce(decoder_cosines(W_dec, chunk=max(1, _COSINES // W_dec.shape[0])))


_PARTS: dict[str, Callable[[_Subject], Part]] = {
    "phases": _phases,
    "threshold_sweep": _sweep,
    "drift": _drift,
    "absorption": _absorption,
    "probing": _probing,
    "decoder": _decoder,
}


def _cell(config: RunConfig, final: TrainedSAE, label: str | None, variant: str) -> dict[str, Any]:
    return {
        "model": label or config.model_name,
        "model_name": config.model_name,
        "hook_point": config.hook_point,
        "method": final.method,
        "variant": variant,
        "L0_target": config.L0_target,
        "R2_target": config.R2_target,
        "F": final.coder.d_sae,
        "seed": config.seed,
        "lr": final.lr,
        "hyperparameters": dict(final.hyperparameters),
    }
