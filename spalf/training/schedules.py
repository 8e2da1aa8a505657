"""What changes with the step: learning rate, L0 reference, sub-threshold weight (M7, M9, M15)."""

from __future__ import annotations

from spalf.config import Schedule

LARGEST_TURN = 0.05
"""By how much a step of Adam may turn a column, in radians. At 0.1 most features of a wide
dictionary become dense, their neighbours die, and no gradient brings L0 down again."""
LAMBDA_DISC_MAX = 0.01
"""Weight of the sub-threshold mass at the end of Phase 1's cooldown."""


def cooldown_progress(plan: Schedule, step: int, cooldown_start: int) -> float:
    """How much of the cooldown has passed, in [0, 1]."""
    return min(1.0, max(0.0, (step - cooldown_start) / plan.cooldown_steps))


def peak_learning_rate(lr: float, d_model: int) -> float:
    """``lr``, or the largest rate at which columns keep their way.

    A step of Adam moves every entry by about the learning rate, and so a column of unit norm by
    about √d times that, whatever the gradient.
    """
    return float(min(lr, LARGEST_TURN / d_model**0.5))


def learning_rate(plan: Schedule, lr: float, step: int, cooldown_start: int) -> float:
    """Phase 1: linear warm-up, constant, then linear decay over the cooldown to a tenth of ``lr``.

    Without a rate of its own Phase 2 stays at that tenth.
    """
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    decay = 1 - (1 - plan.lr_final_ratio) * cooldown_progress(plan, step, cooldown_start)
    return lr * warm * decay


def l0_reference(plan: Schedule, l0_target: float, step: int) -> float:
    """Geometric from ``l0_start`` to ``l0_target`` over ``l0_ramp_steps`` (M9)."""
    if step >= plan.l0_ramp_steps:
        return l0_target
    share = step / plan.l0_ramp_steps
    return float(plan.l0_start * (l0_target / plan.l0_start) ** share)


def lambda_disc(plan: Schedule, step: int, cooldown_start: int) -> float:
    """0 until the cooldown, then a linear ramp to `LAMBDA_DISC_MAX` (M7)."""
    return LAMBDA_DISC_MAX * cooldown_progress(plan, step, cooldown_start)
