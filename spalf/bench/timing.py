"""Times: by CUDA events for kernels, by the clock for whole steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(function: Callable[[], object], repeats: int = 30, warmup: int = 5) -> float:
    """Median time of one call in milliseconds, by CUDA events."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call in milliseconds, by the clock; a GPU is waited for before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def steps_ms(run: Callable[[int], object], steps: int, repeats: int, device: torch.device) -> float:
    """Median over ``repeats`` of the time of a step, in milliseconds, by the clock.

    Args:
        run: does the number of steps it is given.
        steps: in one repeat.
        repeats: of the measurement.
        device: waited for before and after where it is a GPU.
    """
    return statistics.median(clock(lambda: run(steps), device) / steps for _ in range(repeats))
