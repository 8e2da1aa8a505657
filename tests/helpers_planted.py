"""A language model whose activations are sparse sums of known directions, and runs on it.

Activations have a planted dictionary, the rest of the model is one linear map, so a whole run of
calibration, initialisation and both phases takes about a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from spalf.checkpoint import Checkpoint, read_checkpoint, sha256
from spalf.config import RunConfig
from spalf.data import SequenceStream, TokenSplits
from spalf.models import LanguageModel
from spalf.sae import StratifiedSAE, initialise
from spalf.steps.calibrate import calibrate
from spalf.steps.context import StepContext
from spalf.steps.initialise import initialise_step
from spalf.steps.train import phase1, phase2
from spalf.whitening import RunningCovariance, SoftZCA

D_MODEL, D_VOCAB, SEQ_LEN, BATCH = 24, 256, 16, 256
SEQUENCES = {"train": 4096, "calibration": 2048, "evaluation": 256}


class PlantedModel:
    """Each token switches on two directions at its own position and two at the next one."""

    def __init__(self, d_model: int = D_MODEL, d_vocab: int = D_VOCAB, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name, self.hook_point = "planted", "planted.site"
        self.d_model, self.d_vocab, self.n_layers = d_model, d_vocab, 1
        self.device = torch.device("cpu")
        self.dictionary = torch.randn(2 * d_model, d_model, generator=generator)
        self.dictionary /= self.dictionary.norm(dim=1, keepdim=True)
        self.own, self.left = (self._table(generator) for _ in range(2))
        self.mean = torch.randn(d_model, generator=generator)
        self.W_U = torch.randn(d_model, d_vocab, generator=generator) / d_model**0.5
        self.calls: list[int] = []

    def _table(self, generator: torch.Generator) -> Tensor:
        features = torch.stack(
            [
                torch.randperm(len(self.dictionary), generator=generator)[:2]
                for _ in range(self.d_vocab)
            ]
        )
        weights = 1 + torch.rand(self.d_vocab, 2, generator=generator)
        table = (weights.unsqueeze(-1) * self.dictionary[features]).sum(dim=1)
        return table + 0.02 * torch.randn(table.shape, generator=generator)

    def activations(self, tokens: Tensor) -> Tensor:
        self.calls.append(tokens.shape[0])
        return 5 * (self.own[tokens] + self.left[tokens.roll(1, dims=1)] + self.mean)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.activations(tokens) @ self.W_U

    def patched_logits(self, tokens: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
        return patch(self.activations(tokens)) @ self.W_U

    def unembedding(self) -> Tensor:
        return self.W_U


class Silent:
    """A progress display that shows nothing."""

    def update(self, amount: int, shown: Mapping[str, float] | None = None) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class PlantedContext(StepContext):
    """A context whose language model is the planted one."""

    model: Any = None

    def load_model(self, config: RunConfig) -> LanguageModel:
        return self.model


def context(should_stop: Callable[[], bool] = lambda: False) -> PlantedContext:
    return PlantedContext(
        torch.device("cpu"), should_stop, lambda *_: Silent(), model=PlantedModel()
    )


def stream(n_sequences: int, seed: int, seq_len: int = SEQ_LEN) -> SequenceStream:
    return SequenceStream(_tokens(n_sequences, seed, seq_len))


def _tokens(n_sequences: int, seed: int, seq_len: int) -> Any:
    generator = np.random.default_rng(seed)
    return generator.integers(0, D_VOCAB, (n_sequences, seq_len), dtype=np.uint16)


def planted_config(steps: int = 60, **changes: Any) -> RunConfig:
    """A run of ``steps`` steps with anchors; ``runtime`` etc. replace sections, ``method`` adds."""
    changes["method"] = {"anchors": True, **changes.get("method", {})}
    base: dict[str, Any] = {
        "model_name": "planted",
        "hook_point": "planted.site",
        "dataset": "planted",
        "F": 64,
        "L0_target": 4.0,
        "R2_target": 0.999,
        "lr": 1e-2,
        "total_tokens": steps * BATCH,
        "batch_size": BATCH,
        "seq_len": SEQ_LEN,
        "runtime": {"log_every_steps": 1, "device": "cpu", "checkpoint_every_minutes": 1e6},
    }
    return RunConfig.model_validate({**base, **changes})


def write_calibration(config: RunConfig, out: Path) -> Path:
    """Run the calibrate step on planted tokens."""

    def tokenize(dataset: Any, tokenizer: Any, directory: Path, **_: Any) -> TokenSplits:
        directory.mkdir(parents=True)
        splits = {}
        for seed, (name, count) in enumerate(SEQUENCES.items()):
            np.save(directory / f"{name}.npy", _tokens(count, seed, SEQ_LEN))
            digest = sha256(directory / f"{name}.npy")
            splits[name] = {"sequences": count, "sha256": digest}
        info = {"seq_len": SEQ_LEN, "splits": splits}
        (directory / "tokens.json").write_text(json.dumps(info), encoding="utf-8")
        return TokenSplits.open(directory)

    with (
        mock.patch("spalf.steps.tokens.load_tokenizer", lambda *_, **__: range(D_VOCAB)),
        mock.patch("spalf.steps.tokens.tokenize_dataset", tokenize),
        mock.patch("spalf.steps.sources.commit_of", lambda *_: None),
        mock.patch("spalf.steps.calibrate.SEQUENCES_PER_UPDATE", 64),
    ):
        calibrate(config, out, context())
    return out


@dataclass(frozen=True)
class Run:
    """What a planted run left on disk."""

    directory: Path
    config: RunConfig

    def checkpoint(self, step: str) -> Checkpoint:
        return read_checkpoint(self.directory / step)

    def rows(self, step: str = "phase1") -> list[dict[str, Any]]:
        text = (self.directory / step / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def run_phases(
    config: RunConfig, calibration: Path, directory: Path, *, end_to_end: bool = True
) -> Run:
    """init, phase1 and, if wanted, phase2 into ``directory``."""
    made = context()
    initialise_step(config, calibration, directory / "init", made)
    phase1(config, calibration, directory / "init", directory / "phase1", made)
    if end_to_end:
        phase2(config, calibration, directory / "phase1", directory / "phase2", made)
    return Run(directory, config)


def correlated(tokens: int, d_model: int, seed: int) -> Tensor:
    """Activations with a spectrum over three decades, correlated coordinates and a mean."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))
    spread = torch.logspace(0.5, -1, d_model)
    x = torch.randn(tokens, d_model, generator=generator) * spread @ rotation.T
    return x + 3 * torch.randn(d_model, generator=generator)


def allocated(
    x: Tensor, d_sae: int, anchors: Tensor | None = None, surrogate: Any = "rectangle"
) -> StratifiedSAE:
    """An SAE for activations ``x``, as constructed."""
    running = RunningCovariance(x.shape[1])
    running.update(x)
    moments = running.moments()
    whitener = SoftZCA.fit(moments, 100.0, 0.01)
    anchors = torch.zeros(0, x.shape[1]) if anchors is None else anchors
    scale = (moments.variance / x.shape[1]) ** 0.5
    euclidean = torch.eye(x.shape[1])
    return StratifiedSAE(
        whitener, d_sae, anchors, scale, surrogate, "reference", metric_factor=euclidean
    )


def trained_like(x: Tensor, d_sae: int, n_anchored: int = 0, l0: float = 4.0) -> StratifiedSAE:
    """An initialised SAE for activations ``x``."""
    anchors = torch.eye(x.shape[1])[:n_anchored]
    sae = allocated(x, d_sae, anchors)
    initialise(sae, x, l0_start=l0, c_eps=0.5, encoder_init="matched_filter", seed=0)
    return sae
