"""One optimiser step of the augmented Lagrangian, and one of its controller (M7–M14)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from spalf.config import RunConfig, Schedule
from spalf.constraints import (
    CONSTRAINTS,
    Violations,
    coactive_cosine_squared,
    drift_violation,
    faithfulness_violation,
    orthogonality_violation,
)
from spalf.controller import ControllerReading, update
from spalf.lagrangian import augmented_lagrangian, sparsity_objective
from spalf.training.phase import Observation, Phase
from spalf.training.schedules import l0_reference, lambda_disc, learning_rate
from spalf.training.state import TrainState

GRADIENT_NORM = 1.0
BANDWIDTH_EVERY = 100
"""Steps between refreshes of the surrogate bandwidth (M6)."""
BANDWIDTH_TOKENS = 1024


class StepRecord(NamedTuple):
    """What a step leaves for the log; device tensors, read back only when logged.

    Attributes:
        lr: learning rate.
        l0_ref: reference L0.
        l0: achieved L0 of the batch.
        mse: E‖x − x̂‖²/scale².
        kl: nats per token; NaN in Phase 1.
        violations: ``[3]``.
        gradient_norm: global norm before clipping.
    """

    lr: float
    l0_ref: float
    l0: Tensor
    mse: Tensor
    kl: Tensor
    violations: Tensor
    gradient_norm: Tensor


def train_step(
    state: TrainState, batch: Tensor, phase: Phase, config: RunConfig, plan: Schedule
) -> StepRecord:
    """Advance ``state`` by one step, in place.

    Args:
        state: between two steps.
        batch: activations ``[batch_size, d_model]`` (Phase 1) or tokens ``[n_seq, seq_len]``.
        phase: what to observe, and the gains.
        config: the run.
        plan: its schedule.

    Returns:
        The record of the step.
    """
    lr = learning_rate(plan, config.lr, state.step, state.cooldown_start)
    l0_ref = l0_reference(plan, config.L0_target, state.step)
    observed, violations, loss = _forward(state, batch, phase, config, plan)
    control = state.controller
    gradient_norm = _descend(state, loss, lr)
    _after_descent(state, observed, config)
    l0 = observed.output.l0.detach().double().mean()
    reading = ControllerReading(violations.observed, l0, l0_ref)
    state.controller = update(control, reading, phase.gains)
    state.step += 1
    kl = observed.mse.new_full((), torch.nan) if observed.kl is None else observed.kl
    return StepRecord(lr, l0_ref, l0, observed.mse, kl, violations.observed, gradient_norm)


def _forward(
    state: TrainState, batch: Tensor, phase: Phase, config: RunConfig, plan: Schedule
) -> tuple[Observation, Violations, Tensor]:
    """What the batch shows, the constraint violations, and the augmented Lagrangian (M10)."""
    observed = phase.observe(state, batch)
    violations = _violations(state, observed, config, plan)
    objective = sparsity_objective(
        observed.output.l0,
        observed.output.subthreshold,
        l0_ref=l0_reference(plan, config.L0_target, state.step),
        lambda_disc=lambda_disc(plan, state.step, state.cooldown_start),
        d_model=state.sae.d_model,
    )
    control = state.controller
    loss = augmented_lagrangian(
        objective, violations.differentiable, control.law.multiplier, control.rho
    )
    return observed, violations, loss


def first_non_finite(
    state: TrainState, batch: Tensor, phase: Phase, config: RunConfig, plan: Schedule
) -> str:
    """Name the first tensor, in the order of the computation, that is not finite for ``batch``.

    Repeats the step without its update; ``state`` is as it was before it.
    """
    if batch.is_floating_point() and not batch.isfinite().all():
        return "activations"
    observed, violations, loss = _forward(state, batch, phase, config, plan)
    output = observed.output
    seen = {"pre-activations": output.pre, "codes": output.z, "reconstruction": output.x_hat}
    seen |= {"kl": observed.kl} if observed.kl is not None else {}
    seen |= {"violations": violations.observed, "loss": loss}
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    seen |= {
        f"gradient of {n}": p.grad for n, p in state.sae.named_parameters() if p.grad is not None
    }
    bad = [name for name, value in seen.items() if not value.isfinite().all()]
    state.optimizer.zero_grad(set_to_none=True)
    return bad[0] if bad else "gradient norm"


def _violations(
    state: TrainState, observed: Observation, config: RunConfig, plan: Schedule
) -> Violations:
    sae, constants = state.sae, config.constants
    faith = faithfulness_violation(observed.error, state.controller.log_tau)
    anchored = sae.W_dec[: sae.n_anchored]
    drift = drift_violation(anchored, sae.anchors, constants.delta_drift)
    if not config.method.orthogonality:
        return Violations.of(faith, drift, torch.full_like(faith.detach(), -1.0))
    # The batch is shuffled already, so its first tokens are a random subset.
    subset = observed.output.z[: plan.ortho_tokens]
    cosine = coactive_cosine_squared(subset, sae.W_dec, plan.ortho_features)
    ortho = orthogonality_violation(cosine, sae.d_model, constants.c_ortho)
    return Violations.of(faith, drift, ortho)


def _descend(state: TrainState, loss: Tensor, lr: float) -> Tensor:
    """Adam on the Lagrangian with the free columns kept on the sphere; the gradient's norm."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.sae.project_gradient()
    norm = clip_grad_norm_(state.sae.parameters(), GRADIENT_NORM)
    state.guard.observe(loss, norm)
    state.guard.update(state.optimizer)
    state.sae.normalise_free_columns(unless=state.guard.found)
    return norm


def _after_descent(state: TrainState, observed: Observation, config: RunConfig) -> None:
    output = observed.output
    fired = (output.z.detach() > 0).any(dim=0)
    state.stale = torch.where(fired, torch.zeros_like(state.stale), state.stale + 1)
    if (state.step + 1) % BANDWIDTH_EVERY == 0 and not state.guard.stalled():
        state.sae.refresh_bandwidth(output.pre.detach()[:BANDWIDTH_TOKENS], config.constants.c_eps)


def record_row(
    state: TrainState, record: StepRecord, config: RunConfig, dead_after: int
) -> dict[str, float | int]:
    """A record as plain numbers, with one transfer from the device.

    Args:
        state: after the step.
        record: of the step.
        config: the run.
        dead_after: steps without firing after which a feature counts as dead.

    Returns:
        One row of the metrics log.
    """
    control = state.controller
    scalars = [record.l0, record.mse, record.kl, control.log_tau, record.gradient_norm]
    dead = (state.stale >= dead_after).double().mean()
    vectors = [record.violations, control.law.multiplier, control.rho]
    flat = torch.cat([torch.stack([s.double() for s in [*scalars, dead]]), *vectors]).tolist()
    l0, mse, kl, log_tau, gradient_norm, dead_fraction = flat[:6]
    row: dict[str, float | int] = {
        "step": state.step,
        "tokens": state.step * config.batch_size,
        "phase": state.phase,
        "lr": record.lr,
        "l0": l0,
        "l0_ref": record.l0_ref,
        "mse": mse,
        "explained_variance": 1 - mse / state.sae.d_model,
        "log_tau": log_tau,
        "gradient_norm": gradient_norm,
        "dead_fraction": dead_fraction,
    }
    for index, kind in enumerate(("g", "lambda", "rho")):
        for offset, name in enumerate(CONSTRAINTS):
            row[f"{kind}_{name}"] = flat[6 + 3 * index + offset]
    return row if state.phase == 1 else {**row, "kl": kl}
