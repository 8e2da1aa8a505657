"""One optimiser step of the augmented Lagrangian, and one of its controller (M7–M14)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
from spalf.controller.controller import pack, unpack
from spalf.kernels import PreActivations
from spalf.lagrangian import augmented_lagrangian, penalty, sparsity_objective
from spalf.recording import Branch
from spalf.sae import ParameterRows, SAEOutput
from spalf.training.descent import descend
from spalf.training.phase import Observation, Phase
from spalf.training.position import tokens_seen, tokens_silent
from spalf.training.schedules import (
    l0_reference,
    lambda_disc,
    learning_rate,
    peak_learning_rate,
    phase_two_rate,
)
from spalf.training.state import TrainState

REVIVAL_RATE = 3.0
"""Share by which the threshold of a silent feature falls each step, in learning rates."""
BANDWIDTH_EVERY = 100
"""Steps between refreshes of the surrogate bandwidth (M6)."""
BANDWIDTH_TOKENS = 1024
DEAD_TOKENS = 1_000_000
"""Tokens without firing after which a feature counts as dead in the log."""
ORTHO = CONSTRAINTS.index("ortho")
"""Position of the orthogonality constraint, the last, in every vector."""


class StepRecord(NamedTuple):
    """What a step leaves for the log; device tensors, read back only when logged.

    Attributes:
        lr: learning rate; a plain number or on the device.
        l0_ref: reference L0; likewise.
        l0: achieved L0 of the batch.
        mse: E‖x − x̂‖²/scale².
        kl: nats per token; NaN in Phase 1.
        violations: ``[3]``.
        gradient_norm: global norm before clipping.
    """

    lr: float | Tensor
    l0_ref: float | Tensor
    l0: Tensor
    mse: Tensor
    kl: Tensor
    violations: Tensor
    gradient_norm: Tensor


class StepInputs(NamedTuple):
    """What the schedules say about a step; plain numbers, or scalars on the device.

    Attributes:
        lr: learning rate.
        l0_ref: reference L0.
        lambda_disc: weight of the sub-threshold mass.
    """

    lr: float | Tensor
    l0_ref: float | Tensor
    lambda_disc: float | Tensor


def step_inputs(state: TrainState, config: RunConfig, plan: Schedule) -> StepInputs:
    """The schedules at the coming step, as plain numbers."""
    return StepInputs(
        lr=_learning_rate(state, config, plan),
        l0_ref=l0_reference(plan, config.L0_target, state.step, state.sae.d_model),
        lambda_disc=lambda_disc(plan, state.step, state.cooldown_start),
    )


def _learning_rate(state: TrainState, config: RunConfig, plan: Schedule) -> float:
    if state.phase == 2:
        return phase_two_rate(config, state.sae.d_model)
    peak = peak_learning_rate(config.lr, state.sae.d_model)
    return learning_rate(plan, peak, state.step, state.cooldown_start)


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
    given = (batch, *phase.prepare(batch))
    inputs = step_inputs(state, config, plan)
    record, output = advance(state, given, phase, config, plan, inputs)
    finish_step(state, output, config)
    return record


def advance(
    state: TrainState,
    given: tuple[Tensor, ...],
    phase: Phase,
    config: RunConfig,
    plan: Schedule,
    inputs: StepInputs,
) -> tuple[StepRecord, SAEOutput]:
    """The part of a step that happens on the device; nothing in it waits for the host."""
    passed = _forward(state, given, phase, config, plan, inputs)
    observed = passed.observed
    encoded = observed.output.encoded
    controlling = Branch("first")
    with controlling.beside():
        passed.orthogonality.join()
        violations = passed.violations.observed()
        l0 = observed.output.l0.detach().double().mean()
        reading = ControllerReading(violations, l0, inputs.l0_ref)
        after = update(state.controller, reading, phase.gains)
        before, moved = pack(state.controller), pack(after)
    descent = descend(state, passed.losses, passed.rows, encoded.overflow, inputs.lr)
    silent = torch.where(encoded.fired, torch.zeros_like(state.stale), state.stale + 1)
    state.stale = state.guard.keep(state.stale, silent)
    if config.method.revival and state.phase == 1:
        _lower_thresholds(state, plan, inputs.lr)
    controlling.join()
    state.controller = unpack(state.guard.keep(before, moved), after)
    kl = observed.mse.new_full((), torch.nan) if observed.kl is None else observed.kl
    descent.matrices.join()
    norm = descent.gradient_norm
    record = StepRecord(inputs.lr, inputs.l0_ref, l0, observed.mse, kl, violations, norm)
    return record, observed.output


@torch.no_grad()
def _lower_thresholds(state: TrainState, plan: Schedule, lr: float | Tensor) -> None:
    """Let the thresholds of features that have been silent for long sink until they fire again.

    Nothing falls into the window of a feature that never comes near its threshold, so no gradient
    would ever bring it back. The rate follows the learning rate: gradients, which raise thresholds
    again, do too, and must not be outrun while it decays. Phase 2 is too short to find a use for
    what it would bring back.
    """
    fall = REVIVAL_RATE * lr * (state.stale > plan.silence_steps)
    state.sae.log_threshold.sub_(state.guard.keep(torch.zeros_like(fall), fall))


def finish_step(state: TrainState, output: SAEOutput, config: RunConfig) -> None:
    """What the host does after a step: count it, and refresh the bandwidth where it is due (M6)."""
    state.step += 1
    if state.step % BANDWIDTH_EVERY == 0 and not state.guard.stalled():
        state.sae.fit_lists(output.encoded)
        sample = output.encoded.pre.of(BANDWIDTH_TOKENS)
        state.sae.refresh_bandwidth(sample, config.constants.c_eps)


class _Constants(NamedTuple):
    """What the controller has decided for a step, in the type of the violations.

    Attributes:
        multiplier: λ, ``[3]``.
        rho: ρ, ``[3]``.
        log_tau: a scalar.
        branch: on which they are made; to be joined before they are used.
    """

    multiplier: Tensor
    rho: Tensor
    log_tau: Tensor
    branch: Branch


def _constants(state: TrainState) -> _Constants:
    control, branch = state.controller, Branch("first")
    with branch.beside():
        multiplier, rho = control.law.multiplier.float(), control.rho.float()
        return _Constants(multiplier, rho, control.log_tau.float(), branch)


class _Forward(NamedTuple):
    """A forward pass.

    Attributes:
        observed: what the batch shows.
        violations: of the constraints.
        losses: the augmented Lagrangian (M10) as a sum of scalars with gradient.
        rows: rows of the decoder that enter it by themselves.
        orthogonality: the branch on which the last of the violations and of the losses are made;
            to be joined before their values are used.
    """

    observed: Observation
    violations: Violations
    losses: tuple[Tensor, ...]
    rows: list[ParameterRows]
    orthogonality: Branch


def _forward(
    state: TrainState,
    given: tuple[Tensor, ...],
    phase: Phase,
    config: RunConfig,
    plan: Schedule,
    inputs: StepInputs,
) -> _Forward:
    """What the batch shows, and the augmented Lagrangian."""
    sae, constants = state.sae, _constants(state)
    ortho = _Orthogonality(state, config, plan, constants)
    anchored = ParameterRows(sae.W_dec, slice(sae.n_anchored))
    with constants.branch.beside():
        drift = drift_violation(anchored.values, sae.anchors, config.constants.delta_drift)
    observed = phase.observe(state, given, ortho.start)
    sparsity = Branch("first")
    with sparsity.beside():
        objective = sparsity_objective(
            observed.output.l0,
            observed.output.subthreshold,
            l0_ref=inputs.l0_ref,
            lambda_disc=inputs.lambda_disc,
            d_model=sae.d_model,
        )
    constants.branch.join()
    faith = faithfulness_violation(observed.error, constants.log_tau)
    sparsity.join()
    loss = augmented_lagrangian(
        objective, torch.stack([faith, drift]), constants.multiplier[:ORTHO], constants.rho[:ORTHO]
    )
    violations = Violations(faith, drift, ortho.violation)
    return _Forward(
        observed, violations, (loss, *ortho.losses), [anchored, *ortho.rows], ortho.branch
    )


def first_non_finite(
    state: TrainState, batch: Tensor, phase: Phase, config: RunConfig, plan: Schedule
) -> str:
    """Name the first tensor, in the order of the computation, that is not finite for ``batch``.

    Repeats the step without its update; ``state`` is as it was before it.
    """
    if batch.is_floating_point() and not batch.isfinite().all():
        return "activations"
    given = (batch, *phase.prepare(batch))
    passed = _forward(state, given, phase, config, plan, step_inputs(state, config, plan))
    observed, output = passed.observed, passed.observed.output
    loss = torch.stack(passed.losses).sum()
    seen = {"pre-activations": output.encoded.pre.raw, "reconstruction": output.x_hat}
    seen |= {"kl": observed.kl} if observed.kl is not None else {}
    seen |= {"violations": passed.violations.observed(), "loss": loss}
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for part in passed.rows:
        part.add_gradient()
    seen |= {
        f"gradient of {n}": p.grad for n, p in state.sae.named_parameters() if p.grad is not None
    }
    bad = [name for name, value in seen.items() if not value.isfinite().all()]
    state.optimizer.zero_grad(set_to_none=True)
    return bad[0] if bad else "gradient norm"


class _Orthogonality:
    """The orthogonality constraint of one step, on a branch of its own.

    It needs the pre-activations alone, or lists of them, and consists of kernels too small to fill
    a GPU; so does its backward pass, which autograd puts on the same branch. Nothing waits for it
    before the gradients are added up, since its penalty is a loss of its own.

    Attributes:
        violation: a scalar, −1 where there is no such constraint.
        losses: its penalty, where there is one.
        rows: the rows of the decoder that enter it.
        branch: on which they are made.
    """

    def __init__(
        self, state: TrainState, config: RunConfig, plan: Schedule, constants: _Constants
    ) -> None:
        self._state, self._config, self._plan = state, config, plan
        self._constants = constants
        self.branch = Branch("first")
        self.violation = torch.full((), -1.0, device=state.sae.W_dec.device)
        self.losses: list[Tensor] = []
        self.rows: list[ParameterRows] = []

    def start(self, pre: PreActivations) -> None:
        """Work out the violation, from the pre-activations of the batch."""
        if not self._config.method.orthogonality:
            return
        with self.branch.beside():
            self._start(pre)

    def _start(self, pre: PreActivations) -> None:
        sae, plan, constants = self._state.sae, self._plan, self._constants
        # The batch is shuffled already, so its first tokens are a random subset.
        features, active = pre.strongest(plan.ortho_tokens, plan.ortho_features)
        together = ParameterRows(sae.W_dec, features, sae.kernel)
        cosine = coactive_cosine_squared(together.values, active, implementation=sae.kernel)
        c_ortho = self._config.constants.c_ortho
        self.violation = orthogonality_violation(cosine, sae.d_model, c_ortho)
        constants.branch.join()
        self.losses = [penalty(self.violation, constants.multiplier[ORTHO], constants.rho[ORTHO])]
        self.rows = [together]


class LogRow:
    """One row of the metrics log, on its way from the device.

    It is asked for behind everything that the device was given so far. Where the device has been
    given more to do by the time the row is read, it need not stop for it.

    Args:
        state: after the step.
        record: of the step.
        config: the run.
    """

    def __init__(self, state: TrainState, record: StepRecord, config: RunConfig) -> None:
        control = state.controller
        row: dict[str, float | int | Tensor] = {
            "step": state.step,
            "tokens": tokens_seen(config, state.step, state.phase1_end),
            "phase": state.phase,
            "lr": record.lr,
            "l0": record.l0,
            "l0_ref": record.l0_ref,
            "mse": record.mse,
            "log_tau": control.log_tau,
            "gradient_norm": record.gradient_norm,
            "dead_fraction": (tokens_silent(state, config) >= DEAD_TOKENS).double().mean(),
            "kl": record.kl,
            "stalled": state.guard.stalled_steps,
        }
        vectors = {"g": record.violations, "lambda": control.law.multiplier, "rho": control.rho}
        self._d_model = state.sae.d_model
        self._known = {name: v for name, v in row.items() if not isinstance(v, Tensor)}
        coming = {name: v for name, v in row.items() if isinstance(v, Tensor)}
        self._names = [*coming, *(f"{kind}_{name}" for kind in vectors for name in CONSTRAINTS)]
        scalars = torch.stack([v.double() for v in coming.values()])
        flat = torch.cat([scalars, *(v.double() for v in vectors.values())])
        self._values = flat.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if flat.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> dict[str, float | int] | None:
        """The row; ``None`` where the step or one before it was not finite and changed nothing."""
        if self._there is not None:
            self._there.synchronize()
        read = dict(zip(self._names, self._values.tolist(), strict=True))
        if read.pop("stalled"):
            return None
        if self._known["phase"] == 1:
            del read["kl"]
        return {**self._known, **read, "explained_variance": 1 - read["mse"] / self._d_model}
