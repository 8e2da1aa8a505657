"""Parameters the user does not set: each with its formula, its value and where that came from.

`Schedule` holds everything that follows from the configuration alone; what needs data is added by
calibration and initialisation through `describe`. ``spalf describe`` prints the list, and every
run stores it in its ``metadata.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from spalf.config.types import BUFFER_TOKENS, RunConfig

L0_START_MULTIPLE = 4.0
"""m of M9: L0_ref starts at m·L0_target."""


SILENCE_TOKENS = 65_536
"""Tokens of Phase 1 without firing after which a feature's threshold starts to sink."""

PHASE2_SPLIT = 4
"""Phase 2 makes so many steps of the tokens of one step of Phase 1. A small step is noisier, which
the mean of the weights undoes, and there are few of them."""

ORTHO_COLUMNS = 8192
"""Decoder columns compared per step (M8): fewer tokens where each has more features."""


@dataclass(frozen=True)
class Derived:
    """One derived parameter, as printed and stored."""

    name: str
    formula: str
    value: float | int | None
    source: str


@dataclass(frozen=True)
class Schedule:
    """Steps, rates and gains that follow from a `RunConfig` (M9–M16); steps count from 0.

    Attributes:
        total_steps: batches of ``batch_size`` tokens that the token budget pays for, both phases.
        phase1_steps: at most this many of them in Phase 1, a step each.
        phase2_steps: steps of Phase 2, for the tokens of the rest.
        phase2_sequences: sequences of one of them.
        warmup_steps: linear learning-rate warm-up.
        cooldown_steps: length of the decay that ends Phase 1 (and of the λ_disc ramp).
        l0_ramp_steps: L0_ref falls geometrically over this many steps (M9).
        l0_start_limit: most that L0_ref may be at step 0.
        lr_final_ratio: learning rate at the end of the cooldown, as a share of ``lr``.
        omega_c: controller bandwidth per step (M12).
        omega_o: observer bandwidth per step (M12).
        v_max: saturation of the violation signal (M12).
        beta_fast: share kept by the filter that feeds the observer (M11).
        beta_slow: share kept by the one that feeds gates, penalties and setpoint (M11).
        k_s: integral gain of the setpoint loop per step in Phase 1 (M14).
        k_p: its proportional gain, in both phases.
        k_s_phase2: the same in Phase 2, where little time is left to settle.
        block_tokens: activations in one of the buffer's two blocks (M18).
        silence_steps: steps of Phase 1 without firing after which a feature's threshold starts to
            sink.
        subthreshold_tokens: tokens a step on which the sub-threshold mass is estimated (M7).
        ortho_tokens: tokens a step on which co-activation is estimated (M8).
        ortho_features: features kept for each of them, the strongest first.
    """

    total_steps: int
    phase1_steps: int
    phase2_steps: int
    phase2_sequences: int
    warmup_steps: int
    cooldown_steps: int
    l0_ramp_steps: int
    l0_start_limit: float
    lr_final_ratio: float
    omega_c: float
    omega_o: float
    v_max: float
    beta_fast: float
    beta_slow: float
    k_s: float
    k_p: float
    k_s_phase2: float
    block_tokens: int
    silence_steps: int
    subthreshold_tokens: int
    ortho_tokens: int
    ortho_features: int


def schedule(config: RunConfig) -> Schedule:
    """The schedule of one run, a pure function of its configuration."""
    total = config.total_tokens // config.batch_size
    end_to_end = round(config.method.phase2_fraction * total)
    phase1 = total - end_to_end
    sequences = config.batch_size // config.seq_len
    phase2_sequences = max(1, sequences // PHASE2_SPLIT)
    start = L0_START_MULTIPLE * config.L0_target if config.method.l0_schedule else config.L0_target
    omega_c = min(0.05, max(0.01, 40 / phase1))
    ortho_features = min(config.F, max(8, round(2 * config.L0_target)))
    return Schedule(
        total_steps=total,
        phase1_steps=phase1,
        phase2_steps=end_to_end * sequences // phase2_sequences,
        phase2_sequences=phase2_sequences,
        warmup_steps=max(1, min(100, phase1 // 20)),
        cooldown_steps=max(1, phase1 // 5),
        l0_ramp_steps=phase1 // 3,
        l0_start_limit=min(start, config.F / 2),
        lr_final_ratio=0.1,
        omega_c=omega_c,
        omega_o=5 * omega_c,
        v_max=0.3,
        beta_fast=1 - 10 * omega_c,
        beta_slow=1 - omega_c,
        k_s=0.5 * omega_c,
        k_p=0.5,
        k_s_phase2=2 * omega_c,
        block_tokens=_block_tokens(config),
        silence_steps=max(1, SILENCE_TOKENS // config.batch_size),
        subthreshold_tokens=min(config.batch_size, max(256, config.batch_size // 8)),
        ortho_tokens=min(256, config.batch_size, max(16, ORTHO_COLUMNS // ortho_features)),
        ortho_features=ortho_features,
    )


def _block_tokens(config: RunConfig) -> int:
    """Half the buffer, in whole pairs of batches so that no batch straddles two blocks.

    Short runs get a smaller buffer: at least eight blocks, so that mixing still happens.
    """
    pair = 2 * config.batch_size
    wanted = min(BUFFER_TOKENS // 2, config.total_tokens // 8)
    return max(1, wanted // pair) * pair


def describe(config: RunConfig, measured: Mapping[str, float | int] | None = None) -> list[Derived]:
    """Every derived parameter of a run.

    Args:
        config: the run.
        measured: values found by calibration and initialisation, by name; those not yet known
            are listed with value ``None``.
    """
    values = asdict(schedule(config))
    rows = [Derived(name, _FROM_CONFIG[name], values[name], "config") for name in _FROM_CONFIG]
    known = measured or {}
    for name, (formula, source) in _FROM_DATA.items():
        rows.append(Derived(name, formula, known.get(name), source))
    return rows


_FROM_CONFIG = {
    "total_steps": "total_tokens // batch_size",
    "phase1_steps": "(1 − phase2_fraction) · total_steps (M15)",
    "phase2_steps": "the other tokens, phase2_sequences at a time (M15)",
    "phase2_sequences": "batch_size / (4 · seq_len) (M16)",
    "warmup_steps": "min(100, phase1_steps / 20)",
    "cooldown_steps": "phase1_steps / 5",
    "lr_final_ratio": "0.1: the rate at the end of Phase 1, in lr (M16)",
    "l0_start_limit": "min(m·L0_target, F/2), m = 4 (M9)",
    "l0_ramp_steps": "phase1_steps / 3 (M9)",
    "omega_c": "clip(40 / phase1_steps, .01, .05) per step (M12)",
    "omega_o": "5·omega_c (M12)",
    "v_max": "0.3 (M12)",
    "beta_fast": "1 − 10·omega_c (M11)",
    "beta_slow": "1 − omega_c (M11)",
    "k_s": "0.5·omega_c per step (M14)",
    "k_p": "0.5 (M14)",
    "k_s_phase2": "2·omega_c per step (M16)",
    "block_tokens": "min(2^19, total_tokens / 8), whole pairs of batches (M18)",
    "silence_steps": "65536 / batch_size",
    "subthreshold_tokens": "clip(batch_size / 8, 256, batch_size) (M7)",
    "ortho_tokens": "min(256, batch_size, 8192 / ortho_features) (M8)",
    "ortho_features": "clip(2·L0_target, 8, F) (M8)",
}

_FROM_DATA = {
    "v_cap": ("min(V, F/16) (M3)", "init"),
    "whitener_rank": ("smallest k with 1 − delta_rank of the trace (M2)", "calibration"),
    "alpha": ("λ_k / kappa (M2)", "calibration"),
    "calibration_tokens": ("tokens until the split-half error is ≤ delta_cov (M1)", "calibration"),
    "split_half_error": ("‖Σ_a − Σ_b‖_F / ‖Σ‖_F (M1)", "calibration"),
    "variance": ("trace Σ", "calibration"),
    "scale": ("√(trace Σ / d): the unit of codes and errors", "calibration"),
    "l0_start": ("min(l0_start_limit, d/2), at least L0_target (M9)", "init"),
    "theta_quantile": ("1 − l0_start / F (M5)", "init"),
    "init_scale": ("⟨x−μ, z W_dec⟩ / ‖z W_dec‖² (M5)", "init"),
    "bandwidth_median": ("median_j c_eps·IQR_j (M6)", "init"),
    "tau_start": ("half the first E‖x−x̂‖²/scale² (M14)", "init"),
    "tau_floor": ("(1 − R2_target)·E‖x−μ‖²_M/scale² (M14)", "calibration"),
    "lr_peak": ("min(lr, .05/√d) (M4)", "phase1"),
    "lr_phase2": ("min(lr, .005/√d), or method.phase2_lr (M16)", "phase1"),
    "encoder_epsilon": ("F / (2 · batch_size · d²): ε of the encoder's Adam (M10)", "phase1"),
    "threshold_trim_phase1": ("factor on θ at which L0 = L0_target, at the end (M14)", "phase1"),
    "threshold_trim_phase2": ("the same at the end of Phase 2", "phase2"),
    "kl_scale": ("KL at the entry to Phase 2 (M16)", "phase2"),
}
