"""From the Lagrangian to the next weights: projection, clipping, Adam, the sphere (M4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from spalf.kernels import choose
from spalf.recording import Branch
from spalf.sae import ParameterRows
from spalf.training.state import TrainState

THRESHOLD_STEP = 3.0
"""How many times as far as Adam would have them log thresholds move.

A step of the encoder moves a pre-activation by many times what a step of Adam moves a threshold,
and sparsity acts on thresholds alone. Too slow, they cannot hold L0 against the encoder.
"""

GRADIENT_NORM = 1.0
"""Global norm to which the gradient is clipped."""


class Descent(NamedTuple):
    """A step of Adam.

    Attributes:
        gradient_norm: global norm of the projected gradient, before clipping.
        matrices: the branch on which the matrices are moved; to be joined before they are used.
        held: what that branch reads and nobody else holds.
    """

    gradient_norm: Tensor
    matrices: Branch
    held: tuple[Tensor, ...] = ()


def descend(
    state: TrainState,
    losses: Sequence[Tensor],
    rows: Iterable[ParameterRows],
    overflow: Tensor | None,
    lr: float | Tensor,
) -> Descent:
    """One step of Adam on the Lagrangian with the free columns kept on the unit sphere, in place.

    A step whose loss or gradient is not finite, or whose forward pass was void, changes nothing.

    Args:
        state: before the update.
        losses: scalars, the augmented Lagrangian as their sum; each may have been made on a branch
            that has not been joined.
        rows: parts of parameters that are leaves of their own.
        overflow: whether the forward pass was void for want of room.
        lr: learning rate of this step.
    """
    state.optimizer.zero_grad(set_to_none=True)
    fused = choose(state.sae.W_dec, state.sae.kernel).implementation == "triton"
    branch = Branch()
    with branch.beside():
        corrections = _bias_corrections(state.optimizer, lr) if fused else None
    # Not of their sum, which would be there only when the last of them is. What was made on a
    # branch goes back on it, and autograd joins it.
    torch.autograd.backward(losses)
    for part in rows:
        part.add_gradient()
    branch.join()
    loss = torch.stack([part.detach() for part in losses]).sum()
    log_threshold = state.sae.log_threshold.detach()
    before = log_threshold.clone()
    if corrections is None:
        done = _plain(state, loss, overflow, lr)
    else:
        done = _fused(state, loss, overflow, corrections)
    log_threshold.add_(log_threshold - before, alpha=THRESHOLD_STEP - 1)
    return done


def _plain(state: TrainState, loss: Tensor, overflow: Tensor | None, lr: float | Tensor) -> Descent:
    for group in state.optimizer.param_groups:
        group["lr"] = float(lr)
    state.sae.project_gradient()
    norm = clip_grad_norm_(state.sae.parameters(), GRADIENT_NORM)
    state.guard.observe(loss, norm, overflow)
    state.guard.update(state.optimizer)
    state.sae.normalise_free_columns(unless=state.guard.found)
    return Descent(norm, Branch())


@torch.no_grad()
def _fused(
    state: TrainState, loss: Tensor, overflow: Tensor | None, corrections: tuple[Tensor, Tensor]
) -> Descent:
    """The same in one pass over memory for the norm and one for everything else."""
    # Imported late: machines without a GPU need no triton, and importing it is slow.
    from spalf.kernels.triton_adam import AdamScalars, adam, square_norms

    sae, slots = state.sae, _slots(state.optimizer)
    parameters = [p for p in sae.parameters() if p.grad is not None]
    spheres = {sae.W_dec: sae.n_anchored}
    squares = [square_norms(_grad(p), p, spheres.get(p)) for p in parameters]
    norm = torch.cat(squares).sum().sqrt()
    clipping, counting, matrices = Branch(), Branch(), Branch("last")
    with clipping.beside():
        clip = (GRADIENT_NORM / (norm + 1e-6)).clamp_max(1.0)
    state.guard.observe(loss, norm, overflow)
    frozen = state.guard.found
    with counting.beside():
        taken = 1 - frozen
        torch._foreach_add_([slots[p]["step"] for p in parameters], [taken] * len(parameters))
    clipping.join()
    scalars = AdamScalars(*corrections, clip=clip, frozen=frozen)
    group_of = {p: group for group in state.optimizer.param_groups for p in group["params"]}
    for p in parameters:
        moments, group = (slots[p]["exp_avg"], slots[p]["exp_avg_sq"]), group_of[p]
        # What remains of the step touches vectors only.
        with matrices.beside() if p.ndim == 2 else nullcontext():
            adam(
                _grad(p), p, moments, scalars, group["betas"], group["eps"], spheres.get(p),
                copy=sae.operand_of(p),
            )  # fmt: skip
    counting.join()
    return Descent(norm, matrices, scalars)


@torch.no_grad()
def _bias_corrections(optimizer: torch.optim.Adam, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    """lr/(1 − β1ᵗ) and 1/√(1 − β2ᵗ) of the coming step, float32 scalars on the device."""
    slots, group = _slots(optimizer), optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    steps = slots[group["params"][0]]["step"].double() + 1
    return (lr / (1 - beta1**steps)).float(), (1 - beta2**steps).rsqrt().float()


def _slots(optimizer: torch.optim.Adam) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The optimiser's state, made as Adam itself makes it at its first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        slot = optimizer.state[parameter]
        if not slot:
            slot["step"] = torch.zeros((), device=parameter.device)
            slot["exp_avg"] = torch.zeros_like(parameter)
            slot["exp_avg_sq"] = torch.zeros_like(parameter)
    return {p: optimizer.state[p] for p in parameters}


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.contiguous()
