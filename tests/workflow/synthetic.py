"""Result files with the shape of real ones and numbers made up by a formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def metrics(target: float, *, ce_zero: float = 4.0, phase2: bool = False) -> dict[str, Any]:
    delta = 0.9 / math.sqrt(target) * (0.8 if phase2 else 1.0)
    ev = 1 - 0.4 / target**0.4
    return {
        "l0": 1.01 * target,
        "l0_se": 0.01 * target,
        "explained_variance": ev,
        "mse": 1 - ev,
        "ce_clean": 1.5,
        "ce_sae": 1.5 + delta,
        "ce_zero": ce_zero,
        "delta_ce": delta,
        "delta_ce_se": 0.002,
        "ce_recovered": 1 - delta / (ce_zero - 1.5),
        "kl": 0.9 * delta,
        "kl_se": 0.002,
        "dead_fraction": 0.01,
        "dense_fraction": 0.001,
        "lambda_faith": 3.0,
        "tokens": 65536,
        "train_tokens": 2_000_000,
    }


def evaluation(model: str, target: float, seed: int = 0, **cell: Any) -> dict[str, Any]:
    return {
        "cell": {
            "model": model,
            "hook_point": "blocks.0.hook_resid_post",
            "model_name": f"spalf/{model}",
            "method": "spalf",
            "L0_target": target,
            "R2_target": 0.99,
            "F": 1024,
            "seed": seed,
            **cell,
        },
        "environment": {"torch": "2.13.0"},
        "phases": {"phase1": metrics(target), "phase2": metrics(target, phase2=True)},
        "final": "phase2",
    }


def log_row(step: int, phase: int, target: float, steps: int = 2000) -> dict[str, Any]:
    t = step / steps
    ref = target * 4 ** max(0.0, 1 - 2 * t)
    wobble = math.exp(-3 * t) * math.sin(20 * t)
    ev = 1 - 0.4 / target**0.4 - 0.5 * math.exp(-8 * t)
    return {
        "step": step,
        "tokens": 1024 * step,
        "phase": phase,
        "lr": 2e-3,
        "l0": ref * (1 + 0.2 * wobble),
        "l0_ref": ref,
        "mse": 1 - ev,
        "explained_variance": ev,
        "log_tau": math.log(1 - ev),
        "g_faith": 0.6 * wobble,
        "g_drift": -1 + 0.8 * t,
        "g_ortho": -0.5 + 0.3 * wobble,
        "lambda_faith": max(0.0, 4 - t + wobble),
        "lambda_drift": 0.0,
        "lambda_ortho": max(0.0, wobble),
        "rho_faith": 1.0,
        "rho_drift": 1.0,
        "rho_ortho": 1.0,
        "dead_fraction": 0.02 * t,
    } | ({"kl": 0.3} if phase == 2 else {})


def write_metrics(path: Path, target: float, phase: int) -> Path:
    steps = range(0, 1940, 10) if phase == 1 else range(1940, 2000, 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(log_row(s, phase, target)) + "\n" for s in steps))
    return path


def write_evaluation(path: Path, *args: Any, **kwargs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluation(*args, **kwargs)))
    return path
