"""Training a baseline with SAELens: every learning rate on one stream of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spalf.activations import ActivationStore
from spalf.baselines.recipes import (
    Shape,
    build,
    hyperparameters,
    require_saelens,
    schedule_of_rate,
)
from spalf.baselines.selection import Score, score
from spalf.baselines.state import from_checkpoint, to_checkpoint
from spalf.checkpoint import Checkpoint
from spalf.config import RunConfig, schedule
from spalf.errors import Diverged
from spalf.interchange import read_saelens

if TYPE_CHECKING:
    from sae_lens import SAETrainer

State = Callable[[], Checkpoint]
"""Gives the trainers' state as it is then."""

SELECTION_TOKENS = 65_536
"""Tokens of the calibration split on which the learning rates are compared."""


@dataclass(frozen=True)
class Trained:
    """One learning rate's result.

    Attributes:
        lr: peak learning rate.
        folder: its SAELens inference folder.
        score: what it did on the selection tokens.
    """

    lr: float
    folder: Path
    score: Score


@dataclass(frozen=True)
class BaselineResult:
    """What `train_baseline` made.

    Attributes:
        best: the learning rate with the largest explained variance at the target L0.
        tried: every learning rate, in the order given.
        hyperparameters: what was set in SAELens's training configuration.
        schedule: the course of the learning rate, in steps.
        norm_scale: factor on the activations that SAELens folded into the weights.
        tokens: activations each of them was trained on.
    """

    best: Trained
    tried: Sequence[Trained]
    hyperparameters: Mapping[str, Any]
    schedule: Mapping[str, int]
    norm_scale: float
    tokens: int


def train_baseline(
    method: str,
    config: RunConfig,
    store: ActivationStore,
    sample: Tensor,
    selection: list[Tensor],
    out: Path,
    *,
    saved: Checkpoint | None = None,
    on_step: Callable[[int, State], None] = lambda step, state: None,
    nothing_to_lose: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> BaselineResult:
    """Train a SAELens SAE at each of ``config.baselines.lrs`` and say which is best.

    All of them see the batches that Phase 1 of the same configuration sees, in the same order, for
    the tokens of both phases, and start from the same weights.

    Args:
        method: ``batchtopk``, ``topk`` or ``jumprelu``.
        config: the run; its ``F``, ``L0_target``, ``seed``, ``total_tokens``, ``batch_size`` and
            ``baselines`` count.
        store: activations of the training split.
        sample: activations ``[tokens, d_model]`` from which the scale of the input is estimated.
        selection: batches of activations on which the rates are compared.
        out: directory of the inference folders, one for each rate.
        saved: a state to continue from.
        on_step: called after each step with the number of steps done and the trainers' state; may
            raise to stop.
        nothing_to_lose: a block in which the process may be ended at once.

    Raises:
        UserError: SAELens is missing or of another version, or cannot do what ``config`` asks.
        Diverged: no learning rate gave weights that are finite.
    """
    require_saelens()
    plan = schedule(config)
    shape = Shape(sample.shape[1], config.F, config.L0_target, plan.total_steps)
    settings = hyperparameters(method, shape)
    rate = schedule_of_rate(plan.total_steps)
    metadata = {
        "model_name": config.model_name,
        "hook_name": config.hook_point,
        "context_size": config.seq_len,
        "dataset_path": config.dataset.path,
    }
    device = str(sample.device)
    scale = float(shape.d_model**0.5 / sample.norm(dim=-1).mean())
    trainers = []
    with torch.random.fork_rng():
        for lr in config.baselines.lrs:
            torch.manual_seed(config.seed)
            sae = build(method, shape, settings, metadata, device)
            trainers.append(_trainer(sae, config, lr, rate, scale, device))
    done = from_checkpoint(saved, trainers) if saved else 0
    batches = store.batches(config.batch_size, plan.block_tokens, config.seed, done)
    _fit(trainers, batches, range(done, plan.total_steps), on_step)
    with nothing_to_lose():
        tried = [
            _finish(trainer, lr, out / f"rate_{index}", selection, config.L0_target)
            for index, (trainer, lr) in enumerate(zip(trainers, config.baselines.lrs, strict=True))
        ]
    tokens = plan.total_steps * config.batch_size
    return BaselineResult(_best(tried, plan.total_steps), tried, settings, rate, scale, tokens)


def _best(tried: Sequence[Trained], steps: int) -> Trained:
    """The best fit; a rate at which training diverged has none."""
    sound = [t for t in tried if math.isfinite(t.score.matched_explained_variance)]
    if not sound:
        remedy = "at every learning rate tried; give smaller baselines.lrs"
        raise Diverged(steps, "explained variance", "tokens the rates are compared on", remedy)
    return max(sound, key=lambda trained: trained.score.matched_explained_variance)


def selection_activations(calibration: ActivationStore) -> list[Tensor]:
    """The last `SELECTION_TOKENS` of the calibration split, in batches ``[tokens, d_model]``.

    Calibration reads that split from its beginning and training never does, so these tokens have
    made none of the SAEs; and they are not the ones that SAEs are evaluated on.
    """
    stream = calibration.stream
    count = min(max(1, SELECTION_TOKENS // stream.seq_len), stream.n_sequences)
    step = max(1, 4096 // stream.seq_len)
    first, last = stream.n_sequences - count, stream.n_sequences
    return [
        calibration.harvest(start, min(step, last - start)) for start in range(first, last, step)
    ]


def _trainer(
    sae: Any, config: RunConfig, lr: float, rate: Mapping[str, int], scale: float, device: str
) -> SAETrainer[Any, Any]:
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    trainer_config = SAETrainerConfig(
        total_training_samples=schedule(config).total_steps * config.batch_size,
        train_batch_size_samples=config.batch_size,
        lr=lr,
        lr_end=lr / 10,  # asked for, but used by other courses of the rate only
        device=device,
        **rate,
    )
    trainer = SAETrainer(cfg=trainer_config, sae=sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def _fit(
    trainers: Sequence[SAETrainer[Any, Any]],
    batches: Iterator[Tensor],
    steps: range,
    on_step: Callable[[int, State], None],
) -> None:
    """Give every trainer the same batches, through the seams SAELens has for such coordinators.

    Its own coordinator, ``MultiSAETrainer``, has one learning rate for all.
    """
    for step in steps:
        batch = next(batches)
        for trainer in trainers:
            trainer.maybe_reset_sparsity()
            trainer.step(batch)
            trainer.n_training_steps += 1
        on_step(step + 1, lambda: to_checkpoint(trainers))


def _finish(
    trainer: SAETrainer[Any, Any],
    lr: float,
    folder: Path,
    selection: list[Tensor],
    l0_target: float,
) -> Trained:
    """Fold the scale of the input into the weights, as ``fit`` does, save, and measure."""
    scaler = trainer.activation_scaler
    trainer.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    trainer.sae.save_inference_model(folder)
    sae = read_saelens(folder, selection[0].device)
    return Trained(lr, folder, score(sae, selection, l0_target))
