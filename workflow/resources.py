"""What a step asks of the machine that runs it: threads, GPU, memory, time.

All of it follows from the configuration and, once the model is calibrated, from what calibration
measured there: the model's width and the rate at which activations are harvested. Snakemake asks
again just before it starts a job, so the measurement counts from the first step after it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from spalf.config import RunConfig, schedule

MEASURED_MARGIN = 3.0
"""Time asked for over time expected, where the rate was measured on this kind of machine."""

FIXED_MINUTES = 15
"""For starting up: importing, loading the model, waiting for a file system."""

ADAM_BYTES = 4 * 4
"""Per weight: itself, its gradient and two moments, float32."""


@dataclass(frozen=True)
class Site:
    """The language model at the site that is trained on.

    Attributes:
        d_model: width of the activations.
        d_vocab: size of the vocabulary.
        tokens_per_second: harvested by calibration; ``None`` before that.
    """

    d_model: int
    d_vocab: int
    tokens_per_second: float | None = None


def find_commands() -> None:
    """Make ``spalf`` found by its name also where the environment is not activated.

    Put last on the ``PATH``, so that an environment that is activated goes first.
    """
    beside_python = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), beside_python])


def expected_site(config: RunConfig) -> Site:
    """A guess for a model that was not loaded yet: d = F/16 is the usual expansion factor."""
    return Site(d_model=max(64, config.F // 16), d_vocab=50_000)


def measured_site(metadata: Path) -> Site | None:
    """What calibration wrote into its ``metadata.json``; ``None`` where it has not been there."""
    try:
        content = json.loads(metadata.read_text(encoding="utf-8"))
        model, measured = content["model"], content["measured"]
        rate = float(measured["harvest_tokens_per_second"])
        return Site(int(model["d_model"]), int(model["d_vocab"]), rate)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def execution(config: RunConfig) -> str:
    """How a step runs, as JSON for ``--runtime``; nothing here reruns anything."""
    return config.runtime.model_dump_json(exclude={"log_every_steps"}, exclude_defaults=True)


def threads(config: RunConfig) -> int:
    """CPU threads of a step: as configured, else four, or one where cells share the CPU."""
    if config.runtime.threads is not None:
        return config.runtime.threads
    return 1 if config.runtime.device == "cpu" else 4


def took_part(pack: Path, cell: Path, phase: str) -> bool:
    """Whether a pack has done this phase of a cell, so that its job has only to take the result."""
    try:
        diverged = json.loads(pack.read_text(encoding="utf-8"))["diverged"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    kept = cell.glob(f"{phase}.checkpoints/finished_*/metadata.json")
    return str(cell) not in diverged and any(kept)


def gpus(config: RunConfig) -> int | None:
    """One GPU unless the configuration says ``cpu``; ``None`` asks for none."""
    return None if config.runtime.device == "cpu" else 1


def at_one_rate(config: RunConfig) -> RunConfig:
    """The run of a baseline that takes the learning rate of another seed and tries no other."""
    one = config.baselines.model_copy(update={"lrs": config.baselines.lrs[:1]})
    return config.model_copy(update={"baselines": one})


def memory_mb(
    step: str,
    config: RunConfig,
    attempt: int = 1,
    site: Site | None = None,
    cells: int = 1,
) -> int:
    """Memory in MB: program, language model, activation buffer, SAEs with Adam's moments.

    Each retry asks for half as much again, in case the last one ran out.

    Args:
        step: name of the step.
        config: the run.
        attempt: 1 at first, one more for each retry.
        site: see `measured_site`.
        cells: SAEs trained at once.
    """
    site = site or expected_site(config)
    bytes_per_weight = 4 if config.dtype == "float32" else 2
    weights = _transformer_weights(site) + 2 * site.d_vocab * site.d_model
    logits = 3 * 4 * config.batch_size * min(site.d_vocab, 32 * site.d_model)
    blocks = 3 if config.runtime.overlap else 2
    buffer = blocks * 4 * schedule(config).block_tokens * site.d_model
    dictionary = 2 * config.F * site.d_model
    sae = {
        "calibrate": 8 * 4 * site.d_model**2,
        "init": 2 * 4 * dictionary,
        "random": 4 * 4 * dictionary,
        "consistency": 6 * 4 * dictionary + 4 * 4 * 1024 * config.F,
        # Every learning rate at once; their temporaries come one after the other.
        "baseline": len(config.baselines.lrs) * ADAM_BYTES * dictionary
        + 12 * 4 * config.batch_size * config.F,
        "dashboard": 4 * dictionary + 3 * 4 * 16 * 64 * config.F,
        "dashboard_baseline": 4 * dictionary + 3 * 4 * 16 * 64 * config.F,
        # Their temporaries come one after the other as well.
        "pack": cells * ADAM_BYTES * dictionary + 6 * 4 * config.batch_size * config.F,
    }.get(step, ADAM_BYTES * dictionary + 6 * 4 * config.batch_size * config.F)
    needed = 1500e6 + 1.2 * (bytes_per_weight * weights + logits + buffer + sae)
    return math.ceil(needed * (1 + 0.5 * (attempt - 1)) / 1e6)


def minutes(
    step: str,
    config: RunConfig,
    attempt: int = 1,
    site: Site | None = None,
    limit: int | None = None,
    cells: int = 1,
) -> int:
    """Wall-clock minutes to ask for; each retry asks for more.

    A step's work is counted in floating-point operations. Calibration's tokens per second say how
    fast this machine does them. Before that, 2 TFLOP/s with a GPU and 10 GFLOP/s a thread without
    are assumed: far below what is usual, because a time limit that is too short costs more than
    one that is too long.

    Args:
        step: name of the step.
        config: the run.
        attempt: 1 at first, one more for each retry.
        site: see `measured_site`.
        limit: the longest the cluster allows; a step that needs longer continues from its
            checkpoint in a retry.
        cells: SAEs trained at once.
    """
    site = site or expected_site(config)
    work = _operations(step, config, site, cells)
    if site.tokens_per_second:
        rate = site.tokens_per_second * _per_token(site) / MEASURED_MARGIN
    else:
        rate = 2e12 if gpus(config) else 1e10 * threads(config)
    wanted = attempt * (FIXED_MINUTES + math.ceil(work / rate / 60))
    return wanted if limit is None else min(wanted, limit)


def _transformer_weights(site: Site) -> int:
    """Weights in the blocks of a transformer about d/64 layers deep."""
    return 12 * math.ceil(site.d_model / 64) * site.d_model**2


def _per_token(site: Site) -> int:
    """Floating-point operations of the language model for one token."""
    return 2 * _transformer_weights(site)


def _operations(step: str, config: RunConfig, site: Site, cells: int) -> float:
    """Floating-point operations of a whole step."""
    model, sae = _per_token(site), 12 * config.F * site.d_model
    plan = schedule(config)
    evaluated = config.evaluate.tokens + config.evaluate.sweep_tokens * len(
        config.evaluate.sweep_factors
    )
    return {
        "calibrate": config.total_tokens * model,
        "init": plan.block_tokens * (model + sae),
        "random": plan.block_tokens * (model + sae),
        "consistency": 4 * config.F**2 * site.d_model,
        "phase1": plan.phase1_steps * config.batch_size * (model + sae),
        "phase2": plan.phase2_steps * config.batch_size * (3 * model + sae),
        "pack": config.batch_size
        * (
            plan.phase1_steps * (model + cells * sae)
            + plan.phase2_steps * (model + cells * (2 * model + sae))
        ),
        "baseline": plan.total_steps
        * config.batch_size
        * (model + 2 * sae * len(config.baselines.lrs)),
        "evaluate": 2 * evaluated * (2 * model + sae),
        "evaluate_baseline": evaluated * (2 * model + sae),
        "dashboard": 2 * config.evaluate.tokens * (model + sae),
        "dashboard_baseline": 2 * config.evaluate.tokens * (model + sae),
    }[step]
