"""What the hardware allows: the ceilings of a matrix product and of a copy, and the floor."""

from __future__ import annotations

import torch

from spalf.bench.problem import Shape
from spalf.bench.timing import median_ms


def ceilings(shape: Shape, device: torch.device) -> dict[str, float]:
    """Measured ceilings and the floor of a training step at ``shape``.

    The floor is one dense product of batch × d_sae × d_model in bfloat16, the traffic of Adam
    over encoder and decoder (gradient, weight and two moments read, three of them written, in
    float32) and of writing both gradients and reading the pre-activations once, at the speed of a
    copy. Nothing that a sparse step has to do beyond that is counted.

    What it has to do is ``entries_ms``: a row of bfloat16 for each active entry, read at the speed
    of a copy once for decoding, once for the gradient of its code, and once for each of the two
    gradients of weights. A cache may be faster than that.

    Args:
        shape: of the step.
        device: a GPU.

    Returns:
        ``product_ms``, ``copy_bytes_per_s``, ``floor_ms`` and ``entries_ms``.
    """
    x = torch.randn(shape.batch, shape.d_model, device=device, dtype=torch.bfloat16)
    w = torch.randn(shape.F, shape.d_model, device=device, dtype=torch.bfloat16)
    product = median_ms(lambda: x @ w.T)
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    speed = 2 * source.numel() * 4 / (median_ms(lambda: target.copy_(source)) / 1e3)
    weights = 2 * shape.F * shape.d_model * 4
    traffic = (7 + 1) * weights + 2 * shape.batch * shape.F
    return {
        "product_ms": product,
        "copy_bytes_per_s": speed,
        "floor_ms": product + traffic / speed * 1e3,
        "entries_ms": 4 * shape.batch * shape.L0 * shape.d_model * 2 / speed * 1e3,
    }
