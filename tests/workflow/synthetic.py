"""Result files with the shape of real ones and numbers made up by a formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from spalf.config import Cell, SweepConfig

TASKS = (
    "in_string",
    "in_comment",
    "keyword",
    *(f"indent_{d}" for d in ("0", "1", "2", "3_or_more")),
)


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


def full_evaluation(cell: Cell, *, F: int = 1024, quality: float = 1.0) -> dict[str, Any]:
    """An evaluation with every part; ``quality`` divides what is lost, and 0.1 is a random SAE."""
    more: dict[str, Any] = {"method": cell.method, "variant": cell.variant, "F": F, "lr": 0.002}
    if cell.method not in ("spalf", "random"):
        more["hyperparameters"] = {"k": cell.L0_target, "lr_tried": [3e-4, 2e-3]}
    record = evaluation(cell.model, cell.L0_target, cell.seed, **more)
    wobble = 1 + 0.02 * cell.seed
    for row in record["phases"].values():
        for name in ("delta_ce", "kl", "mse"):
            row[name] *= wobble / quality
        row["explained_variance"] = 1 - row["mse"]
        row["ce_sae"] = row["ce_clean"] + row["delta_ce"]
        row["ce_recovered"] = 1 - row["delta_ce"] / (row["ce_zero"] - row["ce_clean"])
    if cell.method != "spalf":
        record |= {"phases": {"sae": record["phases"]["phase1"]}, "final": "sae"}
    last = record["phases"][record["final"]]
    record["threshold_sweep"] = [
        {
            "factor": factor,
            "l0": last["l0"] / factor,
            "delta_ce": last["delta_ce"] * factor**0.5,
            "ce_sae": last["ce_clean"] + last["delta_ce"] * factor**0.5,
            "explained_variance": last["explained_variance"],
        }
        for factor in (0.5, 1.0, 2.0)
    ]
    return record | _parts(cell, quality, wobble)


def _parts(cell: Cell, quality: float, wobble: float) -> dict[str, Any]:
    known = min(0.95, 0.5 + 0.35 * quality * wobble / 1.1)
    scores = {k: {"accuracy": known - d, "f1": 0.4} for k, d in (("k1", 0.05), ("k5", 0.0))}
    scores["all"] = {"accuracy": 0.97, "f1": 0.9}
    histogram = [0] * 22 + [100, 400, 300, 150, 50] + [0] * 13
    parts: dict[str, Any] = {
        "drift": {"n_anchored": 0, "mean_cosine": None, "min_cosine": None},
        "absorption": {"skipped": "the site does not spell"},
        "probing": {
            "tasks": {task: {"positive": 0.2, "features": [1, 2], **scores} for task in TASKS},
            "n_train": 1000,
            "n_test": 500,
            "documents": 9,
        },
        "decoder": {
            "nearest_mean": 0.2 * wobble,
            "nearest_quantiles": {"0.05": 0.1, "0.25": 0.15, "0.5": 0.2, "0.75": 0.3, "0.95": 0.4},
            "nearest_histogram": histogram,
            "near": {"0.5": 0.02, "0.7": 0.01, "0.9": 0.0},
            "mean_square": 0.9 * wobble,
        },
    }
    if cell.method == "spalf":
        parts["controller"] = {
            "phase1": {
                "settling_step": 900 + 10 * cell.seed if cell.L0_target < 100 else None,
                "integral_v2": {"faith": 30.0 * wobble, "drift": 0.0, "ortho": 0.0},
                "lambda_final": {"faith": 2.0 * wobble, "drift": 0.0, "ortho": 0.0},
                "ended_by": "budget",
            }
        }
    if cell.variant == "anchors":
        parts["drift"] = {"n_anchored": 64, "mean_cosine": 0.95 / wobble, "min_cosine": 0.8}
    if cell.L0_target >= 16 and cell.model != "demo-2l":
        parts["absorption"] = {
            "rate": 0.1 * wobble,
            "per_letter": {"a": 0.1},
            "probe_accuracy": 0.9,
            "feature_accuracy": known - 0.05,
            "n_cases": 300,
        }
    return parts


def quality_of(cell: Cell) -> float:
    """How good the SAEs of a line are made, against SPALF's own."""
    lines = {"batchtopk": 0.8, "topk": 0.7, "jumprelu": 0.75, "random": 0.1}
    if not cell.variant:
        return lines.get(cell.method, 1.0)
    return 0.9 + 0.02 * (sum(map(ord, cell.variant)) % 10)


def write_sweep(folder: Path, sweep: SweepConfig) -> None:
    """Everything that the manuscript reads of a sweep, below ``folder``."""
    for cell in sweep.cells():
        place = folder / cell.place
        place.mkdir(parents=True, exist_ok=True)
        config = sweep.run_config(cell)
        record = full_evaluation(cell, F=config.F, quality=quality_of(cell))
        (place / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
        if cell.method == "spalf" and not cell.variant:
            for phase in (1, 2):
                log = place / f"phase{phase}" / "metrics.jsonl"
                write_metrics(log, cell.L0_target, phase)
            benchmark = place / "benchmarks" / "phase1.tsv"
            benchmark.parent.mkdir(exist_ok=True)
            benchmark.write_text("s\tmax_rss\n90.0\t812.5\n", encoding="utf-8")
        if len(sweep.grid.seed) > 1:
            score = 0.9 * quality_of(cell)
            content = {"pw_mcc": score, "pairs": [score + 0.01, score - 0.01]}
            (place.parent / "consistency.json").write_text(json.dumps(content), encoding="utf-8")
