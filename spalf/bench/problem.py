"""The problem every measurement is made on: activations with a planted dictionary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spalf.config import RunConfig, schedule
from spalf.controller import initial_state
from spalf.sae import StratifiedSAE, initialise
from spalf.training.loop import Hooks, PhaseRun, run_phase
from spalf.training.phase import Phase, phase_one
from spalf.training.state import TrainState, make_optimizer
from spalf.training.trim import threshold_factor, trim_thresholds
from spalf.whitening import RunningCovariance, SoftZCA

POOL_BATCHES = 16
"""Different batches the steps go round."""

PLANTED_ACTIVE = 48
"""Planted directions in each activation."""


STANDSTILL = 1e-12
"""Learning rate at which nothing moves any more."""


@dataclass(frozen=True)
class Shape:
    """Size of a training step.

    Attributes:
        d_model: width of the activations.
        F: dictionary size.
        L0: active features per token.
        batch: tokens per step.
    """

    d_model: int
    F: int
    L0: float
    batch: int


class Rounds:
    """A fixed set of batches on the device, served round and round.

    Stands where an `ActivationStore` does, for a step that waits for no language model.

    Args:
        x: activations ``[tokens, d_model]``.
        batch: how many of them a step gets; divides their number.
    """

    def __init__(self, x: Tensor, batch: int) -> None:
        self.x, self.batch = x, batch

    def batches(
        self,
        batch_size: int,
        block_tokens: int,
        seed: int,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> Iterator[Tensor]:
        """Batches ``[batch_size, d_model]`` from ``start_step`` on, for ever."""
        rounds = len(self.x) // self.batch
        while True:
            first = start_step % rounds * self.batch
            yield self.x[first : first + self.batch]
            start_step += 1


class Pool(Rounds):
    """Activations with a planted dictionary, served round and round."""

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        planted = min(2 * shape.F, 2**17)
        directions = torch.randn(planted, shape.d_model, generator=generator, device=device)
        directions /= directions.norm(dim=1, keepdim=True)
        tokens = POOL_BATCHES * shape.batch
        # Frequencies spread over two orders of magnitude, as those of real features do.
        uniform = torch.rand(tokens, PLANTED_ACTIVE, generator=generator, device=device)
        chosen = (planted * uniform.square()).long().clamp_max(planted - 1)
        weights = 1 + torch.rand(tokens, PLANTED_ACTIVE, generator=generator, device=device)
        x = torch.empty(tokens, shape.d_model, device=device)
        for rows in torch.arange(tokens, device=device).split(4096):
            x[rows] = torch.nn.functional.embedding_bag(
                chosen[rows], directions, mode="sum", per_sample_weights=weights[rows]
            )
        x += 0.05 * torch.randn(x.shape, generator=generator, device=device)
        super().__init__(x, shape.batch)


def config_for(
    shape: Shape, precision: str = "auto", kernel: str = "auto", lr: float = 3e-4
) -> RunConfig:
    """The configuration of a long run at ``shape``."""
    return RunConfig.model_validate(
        {
            "model_name": "planted",
            "hook_point": "blocks.0.hook_resid_post",
            "dataset": {"path": "planted"},
            "output_dir": "unused",
            "F": shape.F,
            "L0_target": float(shape.L0),
            "lr": lr,
            "total_tokens": 20_000 * shape.batch,
            "batch_size": shape.batch,
            "seq_len": 128,
            "runtime": {"precision": precision, "kernel": kernel},
        }
    )


def run_on(config: RunConfig, pool: Rounds) -> tuple[TrainState, Phase]:
    """A run on the batches of a pool, past the ramp of its L0."""
    state = state_at_target(config, pool.x)
    return state, phase_one(config, pool, state.sae)  # type: ignore[arg-type]


def state_at_target(config: RunConfig, x: Tensor) -> TrainState:
    """A run past the ramp of its L0, with thresholds at which L0 is what it should be.

    Args:
        config: the run.
        x: activations ``[tokens, d_model]`` like those it will see.
    """
    device, plan, width = x.device, schedule(config), x.shape[1]
    moments = RunningCovariance(width, device)
    moments.update(x)
    found, constants = moments.moments(), config.constants
    whitener = SoftZCA.fit(found, constants.kappa, constants.delta_rank)
    scale = (found.variance / width) ** 0.5
    anchors = torch.zeros(0, width, device=device)
    kernel = config.runtime.kernel
    sae = StratifiedSAE(
        whitener, config.F, anchors, scale, config.method.surrogate, kernel,
        metric_factor=torch.eye(width, device=device),
    )  # fmt: skip
    precision = config.runtime.precision
    sae.precision = "float32" if precision == "float32" or device.type == "cpu" else "bfloat16"
    report = initialise(
        sae, x[:4096], l0_start=config.L0_target, c_eps=config.constants.c_eps,
        encoder_init=config.method.encoder_init, seed=config.seed,
    )  # fmt: skip
    return TrainState(
        sae=sae,
        optimizer=make_optimizer(sae, config),
        controller=initial_state([4.0, 0.0, 0.0], math.log(report.first_mse / 2), device),
        step=plan.l0_ramp_steps + 1,
        phase=1,
        phase1_end=-1,
        cooldown_start=plan.phase1_steps - plan.cooldown_steps,
        ended_by="budget",
        stale=torch.zeros(config.F, dtype=torch.int64, device=device),
        exchange_rate=torch.full((), torch.nan, dtype=torch.float64, device=device),
    )


def train(state: TrainState, phase: Phase, config: RunConfig, steps: int) -> list[dict[str, float]]:
    """Train ``steps`` steps with the real loop; the rows it logs."""
    rows: list[dict[str, float]] = []
    short = replace(phase, last_step=state.step + steps, may_converge=False)
    run_phase(state, short, config, quiet(rows))
    return rows


def steady(state: TrainState, phase: Phase, config: RunConfig) -> Callable[[int], None]:
    """What trains so many steps more of one and the same run, and does not begin anew each time.

    A run compiles its kernels and records its graph once in thousands of steps; timed over some
    fifty, that must not be done over again.
    """
    endless = replace(phase, last_step=2**62, may_converge=False)
    run = PhaseRun(state, endless, config, quiet([]))

    def go(steps: int) -> None:
        end = state.step + steps
        while state.step < end:
            run.advance()

    return go


def hold_at_target(
    state: TrainState, phase: Phase, config: RunConfig, pool: Rounds
) -> Callable[[int], None]:
    """Put L0 on its target and keep it there: like `steady`, with a learning rate of next to 0.

    The work of a step depends on how many entries are active and on nothing else that training
    changes. While L0 still swings about its target, a step costs more or less than it will.
    """
    sample = pool.x[:8192].split(4096)
    trim_thresholds(state.sae, threshold_factor(state.sae, sample, config.L0_target))
    return steady(state, phase, config.model_copy(update={"lr": STANDSTILL}))


def quiet(rows: list[dict[str, float]]) -> Hooks:
    """A loop that logs into a list and saves nothing."""
    return Hooks(
        log=lambda row: rows.append(dict(row)),
        checkpoint=lambda _: None,
        checkpoint_due=lambda _: False,
        should_stop=lambda: False,
    )
