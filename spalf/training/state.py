"""Everything that changes while training, and its way into and out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spalf.checkpoint import Checkpoint
from spalf.config import RunConfig
from spalf.controller import ControllerState
from spalf.controller.controller import from_tensors, to_tensors
from spalf.errors import UserError
from spalf.kernels import Precision
from spalf.sae import StratifiedSAE
from spalf.training.average import WeightAverage
from spalf.training.guard import FiniteGuard
from spalf.training.schedules import encoder_epsilon
from spalf.whitening import SoftZCA

_AVERAGE = "average/"
"""Before the names of the averaged weights, in the optimiser's file."""
BETA2 = {1: 0.999, 2: 0.99}
"""Adam's β₂ by phase. At the entry to Phase 2 gradients become several times as large, and there
are only some hundreds of steps in which second moments can follow."""
PARAMETERS = ("W_enc", "b_enc", "log_threshold", "W_dec", "b_dec")


@dataclass
class TrainState:
    """A training run between two steps.

    Attributes:
        sae: the weights.
        optimizer: Adam over them.
        controller: multipliers, filters, penalties, setpoint.
        step: optimiser steps done, both phases counted.
        phase: 1 or 2.
        phase1_end: step at which Phase 1 ended; −1 while it lasts.
        cooldown_start: step at which Phase 1's cooldown begins; moves forward on convergence.
        ended_by: ``converged`` or ``budget``, once Phase 1's end is settled.
        stale: steps since each feature last fired, int64 ``[d_sae]``.
        exchange_rate: E‖x − x̂‖²/KL at the entry to Phase 2, float64 scalar; NaN before.
        history: (step, log τ, log L0/L0_ref) at the convergence checks (M15).
        derived: measured derived parameters, by name.
        skipped: batches passed over because something was not finite.
        average: mean of the weights over the end of Phase 2, once that is under way (M16).
        guard: sees to it that the state stays finite; not part of a checkpoint.
    """

    sae: StratifiedSAE
    optimizer: torch.optim.Adam
    controller: ControllerState
    step: int
    phase: int
    phase1_end: int
    cooldown_start: int
    ended_by: str
    stale: Tensor
    exchange_rate: Tensor
    history: list[tuple[int, float, float]] = field(default_factory=list)
    derived: dict[str, float | int] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    average: WeightAverage | None = None
    guard: FiniteGuard = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.guard = FiniteGuard(self.stale.device)


def make_optimizer(sae: StratifiedSAE, config: RunConfig, phase: int = 1) -> torch.optim.Adam:
    """Adam over the SAE's parameters, with the memory of a phase.

    The encoder has an ε of its own (`encoder_epsilon`).
    """
    encoder, others = [sae.W_enc, sae.b_enc], [sae.log_threshold, sae.W_dec, sae.b_dec]
    epsilon = encoder_epsilon(config.batch_size, sae.d_sae, sae.d_model)
    groups: list[dict[str, Any]] = [{"params": encoder, "eps": epsilon}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
    set_phase(optimizer, phase)
    return optimizer


def set_phase(optimizer: torch.optim.Adam, phase: int) -> None:
    """Let Adam remember as long as is right for a phase: β = (.9, `BETA2`)."""
    for group in optimizer.param_groups:
        group["betas"] = (0.9, BETA2[phase])


def sae_tensors(sae: StratifiedSAE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The contents of ``model.safetensors`` and ``tensors.safetensors``."""
    weights = {name: getattr(sae, name) for name in PARAMETERS}
    scale = torch.tensor(sae.scale, dtype=torch.float64)
    constants = {f"whitener.{name}": value for name, value in sae.whitener.tensors().items()}
    constants |= {"anchors": sae.anchors, "bandwidth": sae.bandwidth, "scale": scale}
    if sae.metric_factor is not None:
        constants["metric_factor"] = sae.metric_factor
    return weights, constants


def load_sae(checkpoint: Checkpoint, config: RunConfig, device: torch.device) -> StratifiedSAE:
    """Rebuild the SAE of a checkpoint.

    Raises:
        UserError: the checkpoint's dictionary size is not the configuration's.
    """
    found = checkpoint.tensors["model"]["W_enc"].shape[0]
    if found != config.F:
        raise UserError("F", config.F, f"the checkpoint has F = {found}")
    sae = sae_from_tensors(checkpoint.tensors, device)
    sae.surrogate, sae.kernel = config.method.surrogate, config.runtime.kernel
    sae.centred = config.method.centred_gradient
    sae.precision = _precision(config.runtime.precision, device)
    return sae


def _precision(wanted: str, device: torch.device) -> Precision:
    """Operands of matrix products: on a GPU bfloat16 unless the configuration says otherwise."""
    if wanted == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return "bfloat16" if wanted == "bfloat16" else "float32"


def sae_from_tensors(
    files: Mapping[str, Mapping[str, Tensor]], device: torch.device
) -> StratifiedSAE:
    """Rebuild an SAE from the tensors of ``model`` and ``tensors``, by file stem."""
    weights, constants = files["model"], files["tensors"]
    prefix = "whitener."
    whitener = SoftZCA.from_tensors(
        {k.removeprefix(prefix): v for k, v in constants.items() if k.startswith(prefix)}
    ).to(device)
    anchors = constants["anchors"].to(device)
    factor = constants.get("metric_factor")
    sae = StratifiedSAE(
        whitener,
        weights["W_enc"].shape[0],
        anchors,
        float(constants["scale"]),
        metric_factor=None if factor is None else factor.to(device),
    )
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(sae, name).copy_(weights[name])
        sae.bandwidth.copy_(constants["bandwidth"])
    return sae


def to_checkpoint(state: TrainState, metadata: dict[str, Any]) -> Checkpoint:
    """The whole state as the five files; ``metadata`` is merged into ``metadata.json``."""
    weights, constants = sae_tensors(state.sae)
    optimizer = {
        f"{PARAMETERS[index]}.{name}": value
        for index, slots in state.optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }
    if state.average is not None:
        optimizer |= {f"{_AVERAGE}{k}": v for k, v in state.average.tensors().items()}
    control = to_tensors(state.controller)
    control |= {"stale": state.stale, "exchange_rate": state.exchange_rate}
    scalars = {
        "step": state.step,
        "phase": state.phase,
        "phase1_end": state.phase1_end,
        "cooldown_start": state.cooldown_start,
        "ended_by": state.ended_by,
        "history": state.history,
        "derived": state.derived,
        "skipped": state.skipped,
    }
    files = {"model": weights, "tensors": constants, "control": control, "optimizer": optimizer}
    return Checkpoint(files, {**metadata, "state": scalars})


def from_checkpoint(checkpoint: Checkpoint, config: RunConfig, device: torch.device) -> TrainState:
    """Inverse of `to_checkpoint` (I10)."""
    sae = load_sae(checkpoint, config, device)
    optimizer = make_optimizer(sae, config, checkpoint.metadata["state"]["phase"])
    slots: dict[int, dict[str, Tensor]] = {}
    average: dict[str, Tensor] = {}
    for key, value in checkpoint.tensors["optimizer"].items():
        if key.startswith(_AVERAGE):
            average[key.removeprefix(_AVERAGE)] = value.to(device)
            continue
        parameter, name = key.split(".")
        slots.setdefault(PARAMETERS.index(parameter), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    control = {name: value.to(device) for name, value in checkpoint.tensors["control"].items()}
    scalars = checkpoint.metadata["state"]
    return TrainState(
        sae=sae,
        optimizer=optimizer,
        stale=control.pop("stale"),
        exchange_rate=control.pop("exchange_rate"),
        controller=from_tensors(control),
        step=scalars["step"],
        phase=scalars["phase"],
        phase1_end=scalars["phase1_end"],
        cooldown_start=scalars["cooldown_start"],
        ended_by=scalars["ended_by"],
        history=[(int(step), tau, l0) for step, tau, l0 in scalars["history"]],
        derived=scalars["derived"],
        skipped=scalars["skipped"],
        average=WeightAverage.from_tensors(average) if average else None,
    )
