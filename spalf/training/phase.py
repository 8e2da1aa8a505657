"""A phase as data: where batches come from, what is observed of them, which gains hold (M15, M16).

Phase 1 sees shuffled activations and needs the language model only up to the site. Phase 2 sees
sequences, puts the reconstruction back, and adds the divergence of the predictions to the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from spalf.activations import ActivationStore, next_token_kl
from spalf.config import RunConfig, Schedule, schedule
from spalf.constraints import blended_error
from spalf.controller import ControllerGains
from spalf.kernels import Meanwhile, squared_errors
from spalf.models.huggingface import HuggingFaceModel
from spalf.sae import SAEOutput, StratifiedSAE
from spalf.training.position import first_sequence_of_phase_two
from spalf.training.schedules import l0_reference, lambda_disc
from spalf.training.state import TrainState, set_phase

FLOOR_MARGIN = 0.05
"""How far below (1 − R2_target)·Var, in log units, the budget may sink: a run that rests there
meets R2_target on held-out tokens too, instead of missing it by a hair."""


class Observation(NamedTuple):
    """What the loop needs to know of one forward pass; scalars unless said otherwise.

    Attributes:
        output: the SAE's forward pass.
        error: what the faithfulness constraint bounds, with gradient.
        mse: E‖x − x̂‖²/scale², detached.
        kl: nats per token, detached; ``None`` in Phase 1.
    """

    output: SAEOutput
    error: Tensor
    mse: Tensor
    kl: Tensor | None


@dataclass(frozen=True)
class Phase:
    """Everything in which the two phases differ.

    Attributes:
        number: 1 or 2.
        batches: ``batches(k)`` yields the batches from the k-th of the phase on.
        prepare: what else a forward pass over a batch needs, worked out before it.
        observe: forward pass over one batch and what was prepared for it.
        gains: controller gains that hold throughout.
        first_step: step of the run at which the phase starts.
        last_step: step at which it ends at the latest.
        may_converge: whether it may end before that (M15).
        average_from: step after which the mean of the weights is taken, with which the phase ends;
            ``None`` where it ends with the last weights.
        recordable: whether a step may be tried as a CUDA graph.
    """

    number: int
    batches: Callable[[int], Iterator[Tensor]]
    prepare: Callable[[Tensor], tuple[Tensor, ...]]
    observe: Callable[[TrainState, tuple[Tensor, ...], Meanwhile | None], Observation]
    gains: ControllerGains
    first_step: int
    last_step: int
    may_converge: bool
    average_from: int | None = None
    recordable: bool = True


def phase_one(config: RunConfig, store: ActivationStore, sae: StratifiedSAE) -> Phase:
    """Reconstruction on shuffled activations (M15)."""
    plan = schedule(config)

    def observe(
        state: TrainState, given: tuple[Tensor, ...], meanwhile: Meanwhile | None
    ) -> Observation:
        (x,) = given
        expected = l0_reference(plan, config.L0_target, state.step, state.sae.d_model)
        weighed = lambda_disc(plan, state.step, state.cooldown_start) > 0
        output = state.sae(x, expected, plan.subthreshold_tokens if weighed else 0, meanwhile)
        error, mse = _reconstruction_errors(state.sae, output, config.method.metric)
        return Observation(output, error, mse, None)

    return Phase(
        number=1,
        batches=lambda start: store.batches(
            config.batch_size, plan.block_tokens, config.seed, start, plan.phase1_steps
        ),
        prepare=lambda _: (),
        observe=observe,
        gains=phase_one_gains(config, plan, sae),
        first_step=0,
        last_step=plan.phase1_steps,
        may_converge=True,
    )


def phase_two(
    config: RunConfig, store: ActivationStore, sae: StratifiedSAE, phase1_end: int
) -> Phase:
    """End-to-end training on sequences that Phase 1 has not seen (M16)."""
    plan = schedule(config)
    gains = phase_one_gains(config, plan, sae)
    k_s = plan.k_s_phase2 if config.method.setpoint else 0.0

    def observe(
        state: TrainState, given: tuple[Tensor, ...], meanwhile: Meanwhile | None
    ) -> Observation:
        tokens, clean = given
        return observe_end_to_end(state, tokens, store, config, meanwhile, clean)

    return Phase(
        number=2,
        batches=lambda start: sequence_batches(config, store, phase1_end, start),
        prepare=lambda tokens: (store.clean_logits(tokens),),
        observe=observe,
        gains=replace(gains, c_eta=None, k_s=k_s),
        first_step=phase1_end,
        last_step=phase1_end + plan.phase2_steps,
        may_converge=False,
        average_from=phase1_end + plan.phase2_steps // 2 if config.method.averaging else None,
        recordable=isinstance(store.model, HuggingFaceModel),
    )


def phase_one_gains(config: RunConfig, plan: Schedule, sae: StratifiedSAE) -> ControllerGains:
    """The controller constants of Phase 1 for this run (M11–M14)."""
    floor = (1 - config.R2_target) * metric_variance(sae, config.method.metric)
    return ControllerGains(
        law=config.method.controller,
        omega_c=plan.omega_c,
        omega_o=plan.omega_o,
        v_max=plan.v_max,
        beta_fast=plan.beta_fast,
        beta_slow=plan.beta_slow,
        c_eta=config.constants.c_eta if config.method.capu else None,
        k_s=plan.k_s if config.method.setpoint else 0.0,
        k_p=plan.k_p,
        log_tau_floor=math.log(floor) - FLOOR_MARGIN,
    )


def metric_variance(sae: StratifiedSAE, metric: str) -> float:
    """E‖x − μ‖²_M in the units of the training error.

    It is d for the Euclidean metric, since scale² = tr Σ/d, and for the one with the Fisher
    information, which is scaled so; Σ_i λ_i/(λ_i + α) for the Mahalanobis one.
    """
    if metric != "mahalanobis":
        return float(sae.d_model)
    whitener = sae.whitener
    kept = float((whitener.eigenvalues / (whitener.eigenvalues + whitener.alpha)).sum())
    rest = float(whitener.complement / (whitener.complement + whitener.alpha))
    missing = sae.d_model - len(whitener.eigenvalues)
    return kept + missing * rest if missing else kept


def sequence_batches(
    config: RunConfig, store: ActivationStore, phase1_end: int, start: int
) -> Iterator[Tensor]:
    """Batches of sequences ``[phase2_sequences, seq_len]``, after Phase 1's last block."""
    first = first_sequence_of_phase_two(config, phase1_end)
    per_batch = schedule(config).phase2_sequences
    while True:
        yield store.sequences(first + start * per_batch, per_batch)
        start += 1


def observe_end_to_end(
    state: TrainState,
    tokens: Tensor,
    store: ActivationStore,
    config: RunConfig,
    meanwhile: Meanwhile | None = None,
    clean: Tensor | None = None,
) -> Observation:
    """One end-to-end forward pass: reconstruction, patched model, divergence (M16).

    Args:
        state: its SAE is run.
        tokens: int64 ``[n_seq, seq_len]``.
        store: of the language model.
        config: the run.
        meanwhile: see `StratifiedSAE.forward`.
        clean: the language model's own logits, where they are known already.
    """
    seen: list[SAEOutput] = []
    rows = schedule(config).subthreshold_tokens

    def patch(x: Tensor) -> Tensor:
        seen.append(state.sae(x.flatten(0, 1), config.L0_target, rows, meanwhile))
        return seen[-1].x_hat.view_as(x)

    clean = store.clean_logits(tokens) if clean is None else clean
    kl = next_token_kl(clean, store.model.patched_logits(tokens, patch)).mean()
    error, mse = _reconstruction_errors(state.sae, seen[0], config.method.metric)
    blended = blended_error(error, kl, state.exchange_rate)
    return Observation(seen[0], blended, mse, kl.detach())


@torch.no_grad()
def enter_phase_two(
    state: TrainState, config: RunConfig, store: ActivationStore, batches: int = 64
) -> None:
    """Measure the exchange rate that makes the entry bumpless, and switch the phase (M16).

    The divergence is averaged over the first batches that Phase 2 will train on. The
    multipliers, the setpoint, the filters and the optimiser's moments carry over untouched.

    Args:
        state: at the end of Phase 1; changed in place.
        config: the run.
        store: sequences and the language model.
        batches: sequence batches averaged over.
    """
    state.exchange_rate = torch.ones_like(state.exchange_rate)
    stream = sequence_batches(config, store, state.step, 0)
    pairs = []
    for _ in range(batches):
        observed = observe_end_to_end(state, next(stream), store, config)
        assert observed.kl is not None
        pairs.append(torch.stack([2 * observed.error - observed.kl, observed.kl]))
    error, kl = torch.stack(pairs).double().mean(dim=0)
    state.exchange_rate = error / kl.clamp_min(1e-12)
    state.phase, state.phase1_end = 2, state.step
    set_phase(state.optimizer, 2)
    state.derived["kl_scale"] = float(kl)


def _reconstruction_errors(
    sae: StratifiedSAE, output: SAEOutput, metric: str
) -> tuple[Tensor, Tensor]:
    """The error in the constraint's metric (with gradient) and the plain one (detached)."""
    factor = sae.metric_factor if metric == "fisher" else None
    assert metric != "fisher" or factor is not None
    dtype = torch.bfloat16 if sae.precision == "bfloat16" else torch.float32
    error, mse = squared_errors(
        output.encoded.x_hat, output.x, sae.scale, factor, dtype, implementation=sae.kernel
    )
    if metric == "mahalanobis":
        error = sae.whitener.mahalanobis(output.residual * sae.scale).mean()
    return error, mse
