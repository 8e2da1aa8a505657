"""What changes with the step: learning rate, L0 reference, sub-threshold weight (M7, M9, M15)."""

from __future__ import annotations

from spalf.config import RunConfig, Schedule

LARGEST_TURN = 0.05
"""By how much a step of Adam may turn a column, in radians. At 0.1 most features of a wide
dictionary become dense, their neighbours die, and no gradient brings L0 down again."""
PHASE2_TURN = 0.005
"""The same for the constant rate of Phase 2."""
LAMBDA_DISC_MAX = 0.01
"""Weight of the sub-threshold mass at the end of Phase 1's cooldown."""


def encoder_epsilon(batch_size: int, d_sae: int, d_model: int) -> float:
    """ε of Adam for encoder rows and biases: F/(2·batch_size·d²).

    One firing on one token adds some 10/(batch_size·d) to an entry's gradient, several times that
    where a feature is rare. Where a feature was silent for so long that its second moments hold
    nothing else, that one token would move its row by up to 31 learning rates. The more columns
    there are for each dimension, the less of that they stand.
    """
    return d_sae / (2 * batch_size * d_model**2)


def cooldown_progress(plan: Schedule, step: int, cooldown_start: int) -> float:
    """How much of the cooldown has passed, in [0, 1]."""
    return min(1.0, max(0.0, (step - cooldown_start) / plan.cooldown_steps))


def peak_learning_rate(lr: float, d_model: int) -> float:
    """``lr``, or the largest rate at which columns keep their way.

    A step of Adam moves every entry by about the learning rate, and so a column of unit norm by
    about √d times that, whatever the gradient.
    """
    return float(min(lr, LARGEST_TURN / d_model**0.5))


def phase_two_rate(config: RunConfig, d_model: int) -> float:
    """The rate of end-to-end training (M16): ``method.phase2_lr``, or else min(``lr``, .005/√d).

    What suits Phase 2 depends on how far a step turns a column, and not on the rate of Phase 1,
    at whose end it has decayed to next to nothing where ``lr`` is low.
    """
    if config.method.phase2_lr is not None:
        return config.method.phase2_lr
    return float(min(config.lr, PHASE2_TURN / d_model**0.5))


def learning_rate(plan: Schedule, lr: float, step: int, cooldown_start: int) -> float:
    """Phase 1: linear warm-up, constant, then linear decay over the cooldown to a tenth."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    decay = 1 - (1 - plan.lr_final_ratio) * cooldown_progress(plan, step, cooldown_start)
    return lr * warm * decay


def first_l0(plan: Schedule, l0_target: float, d_model: int) -> float:
    """L0 at which Phase 1 begins (M9).

    With d active features and more a basis that is always on reconstructs everything, and a run
    that has found one does not leave it for fewer features again. From d/2 none finds one.
    """
    return max(l0_target, min(plan.l0_start_limit, d_model / 2))


def l0_reference(plan: Schedule, l0_target: float, step: int, d_model: int) -> float:
    """Geometric from `first_l0` to ``l0_target`` over ``l0_ramp_steps`` (M9)."""
    if step >= plan.l0_ramp_steps:
        return l0_target
    start = first_l0(plan, l0_target, d_model)
    return float(start * (l0_target / start) ** (step / plan.l0_ramp_steps))


def lambda_disc(plan: Schedule, step: int, cooldown_start: int) -> float:
    """0 until the cooldown, then a linear ramp to `LAMBDA_DISC_MAX` (M7)."""
    return LAMBDA_DISC_MAX * cooldown_progress(plan, step, cooldown_start)
