"""The training steps that are compared: SPALF's and SAELens's, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spalf.baselines.recipes import Shape as BaselineShape
from spalf.baselines.recipes import build, hyperparameters
from spalf.bench.problem import Pool, Shape, config_for, hold_at_target, run_on, steady
from spalf.bench.timing import steps_ms

SETTLING_STEPS = 700
"""Steps before SPALF's are timed, so that some features are common and others rare."""


LR = 2e-3
"""Learning rate of SPALF until then."""


@dataclass(frozen=True)
class Timing:
    """One contestant at one shape.

    Attributes:
        ms: median time of a step.
        peak_gib: most memory in use beyond the batches; 0 on a CPU.
        l0: active features per token when it was timed; NaN where it is not known.
    """

    ms: float
    peak_gib: float
    l0: float


def spalf_step(
    shape: Shape, device: torch.device, *, steps: int, repeats: int, settle: int, **options: str
) -> Timing:
    """Time SPALF's real loop; ``options`` are runtime settings."""
    pool = Pool(shape, device)
    config = config_for(shape, lr=LR, **options)
    state, phase = run_on(config, pool)
    steady(state, phase, config)(settle)
    run = hold_at_target(state, phase, config, pool)
    run(max(10, steps // 4))
    base = _start_counting(device, pool)
    ms = steps_ms(run, steps, repeats, device)
    peak = _peak(device, base)
    with torch.no_grad():
        l0 = float(state.sae(pool.x[: shape.batch], shape.L0).l0.mean())
    return Timing(ms, peak, l0)


def saelens_step(
    method: str, shape: Shape, device: torch.device, *, autocast: bool, steps: int, repeats: int
) -> Timing:
    """Time SAELens's trainer on the batches that SPALF gets."""
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    pool = Pool(shape, device)
    total = 20_000
    sized = BaselineShape(shape.d_model, shape.F, shape.L0, total)
    base = _start_counting(device, pool)
    sae = build(method, sized, hyperparameters(method, sized), {}, str(device))
    config = SAETrainerConfig(
        total_training_samples=total * shape.batch,
        train_batch_size_samples=shape.batch,
        lr=3e-4,
        lr_end=3e-5,
        device=str(device),
        lr_warm_up_steps=0,
        lr_decay_steps=total // 5,
        autocast=autocast,
    )
    trainer: Any = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = float(
        shape.d_model**0.5 / pool.x[:4096].norm(dim=-1).mean()
    )
    run = _saelens_run(trainer, pool)
    run(max(5, steps // 4))
    return Timing(steps_ms(run, steps, repeats, device), _peak(device, base), float("nan"))


def _saelens_run(trainer: Any, pool: Pool) -> Callable[[int], None]:
    batches = pool.batches(pool.batch, 0, 0)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.maybe_reset_sparsity()
            trainer.step(next(batches))
            trainer.n_training_steps += 1

    return run


def _start_counting(device: torch.device, pool: Pool) -> int:
    """Bytes that are the batches' and count for nobody."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return pool.x.numel() * pool.x.element_size()


def _peak(device: torch.device, base: int) -> float:
    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated(device) - base) / 2**30
