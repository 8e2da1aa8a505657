"""Faithfulness: reconstruction error, and in Phase 2 the loss of the patched model (M8, M16)."""

from __future__ import annotations

from torch import Tensor


def faithfulness_violation(error: Tensor, log_tau: Tensor) -> Tensor:
    """g_faith = log(error/τ): the relative excess of the error over its budget (M8).

    Args:
        error: mean squared error, or `blended_error` in Phase 2; a positive scalar.
        log_tau: log of the budget τ in the same unit; a constant of the step.

    Returns:
        A scalar in the dtype of ``error``.
    """
    return error.log() - log_tau.to(error.dtype)


def blended_error(mse: Tensor, kl: Tensor, exchange_rate: Tensor) -> Tensor:
    """½·E‖x − x̂‖² + ½·KL·rate: the Phase 2 error, in units of the first term (M16).

    ``exchange_rate`` is E‖x − x̂‖²/KL at the entry to Phase 2, so that the blend equals the mean
    squared error there and the violation does not jump. Unlike a KL divided by a constant, the
    whole blend is compared with τ, which gives the setpoint loop authority over both halves.

    Args:
        mse: E‖x − x̂‖², a scalar.
        kl: KL(p_orig ‖ p_patched) in nats per token, a scalar.
        exchange_rate: a positive scalar, constant through Phase 2.

    Returns:
        A scalar.
    """
    return 0.5 * mse + 0.5 * kl * exchange_rate.to(kl.dtype)
