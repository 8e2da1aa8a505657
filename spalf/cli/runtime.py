"""Process set-up: device, threads, TF32, seeds, signals, logging. Nothing else picks these."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from spalf.cli.progress import open_progress
from spalf.cli.revision import commit
from spalf.cli.stopping import Stopping
from spalf.config import RuntimeConfig
from spalf.errors import UserError
from spalf.steps.context import StepContext
from spalf.steps.trackers import require_trackers

logger = logging.getLogger(__name__)


def set_up(runtime: RuntimeConfig, seed: int, **policy: Any) -> StepContext:
    """Configure the process and return the context steps run in.

    Args:
        runtime: device, threads, TF32.
        seed: of torch's global generator; every stream the method draws from has its own.
        policy: further fields of `StepContext`, by name.

    Raises:
        UserError: a GPU or a tracker was asked for that is not there.
    """
    require_trackers(runtime.trackers)
    device = pick_device(runtime.device)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    elif "OMP_NUM_THREADS" not in os.environ and "SNAKEMAKE_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["SNAKEMAKE_THREADS"]))
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = runtime.tf32
    torch.backends.cudnn.allow_tf32 = runtime.tf32
    stopping = Stopping()
    return StepContext(
        device,
        stopping,
        open_progress,
        commit(),
        nothing_to_lose=stopping.nothing_to_lose,
        **policy,
    )


def pick_device(wanted: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UserError: ``wanted`` names a GPU that torch does not see.
    """
    available = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count() if available else 0
        if (device.index or 0) >= count:
            remedy = f"torch sees {count} GPUs here; use --device cpu or auto"
            raise UserError("device", wanted, remedy)
    return device


def configure_logging(debug: bool) -> None:
    """Log to standard error: warnings of libraries, everything of ours."""
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("spalf").setLevel(level)
