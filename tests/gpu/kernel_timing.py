"""Time the JumpReLU kernels against the reference and against its compiled form.

Run as ``python -m tests.gpu.kernel_timing --out FILE.json`` on a machine with a CUDA device. The
bytes counted are those that have to move: pre in and z out going forward; pre and dz in and d_pre
out going back. They are divided by the median time and set against a measured copy of the size of
``pre``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.bench.timing import median_ms
from spalf.kernels import jumprelu


def copy_ceiling(like: Tensor) -> float:
    """Bytes per second, read plus written, of a device copy of ``like``."""
    target = torch.empty_like(like)
    seconds = median_ms(lambda: target.copy_(like)) / 1e3
    return 2 * like.numel() * like.element_size() / seconds


def inputs(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A call with about 64 of 32768 codes active and a window that holds a few per cent."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    return {
        "pre": noise(rows, columns).to(dtype).requires_grad_(),
        "threshold": torch.full((columns,), 2.9, device="cuda").requires_grad_(),
        "bandwidth": torch.full((columns,), 0.67, device="cuda"),
        "dz": noise(rows, columns).to(dtype),
        "dl0": noise(rows),
        "dsub": noise(rows),
    }


def measure(
    call: Callable[..., tuple[Tensor, Tensor, Tensor]], given: dict[str, Tensor], ceiling: float
) -> dict[str, Any]:
    """Times and achieved bytes per second of forward, backward and backward without dsub."""
    pre, threshold, bandwidth = given["pre"], given["threshold"], given["bandwidth"]
    outputs = call(pre, threshold, bandwidth)
    size = pre.numel() * pre.element_size()

    def backward(used: int) -> object:
        back = [given["dz"], given["dl0"], given["dsub"]][:used]
        return torch.autograd.grad(outputs[:used], [pre, threshold], back, retain_graph=True)

    times = {
        "forward": (median_ms(lambda: call(pre, threshold, bandwidth)), 2 * size),
        "backward": (median_ms(lambda: backward(3)), 3 * size),
        "backward_without_sub": (median_ms(lambda: backward(2)), 3 * size),
    }
    return {
        name: {
            "ms": ms,
            "bytes_per_second": moved / ms * 1e3,
            "share_of_copy": moved / ms * 1e3 / ceiling,
        }
        for name, (ms, moved) in times.items()
    }


def implementations() -> dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """The three contenders, by name."""

    def reference(pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Any:
        return jumprelu(pre, threshold, bandwidth, implementation="reference")

    def kernel(pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Any:
        return jumprelu(pre, threshold, bandwidth, implementation="triton")

    return {"triton": kernel, "reference": reference, "compiled": torch.compile(reference)}


def run(rows: int, columns: int) -> dict[str, Any]:
    """Everything that is measured, as one JSON-ready mapping."""
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": [rows, columns],
        "results": {},
    }
    for dtype in (torch.bfloat16, torch.float32):
        given = inputs(rows, columns, dtype)
        ceiling = copy_ceiling(given["pre"].detach())
        found: dict[str, Any] = {"copy_bytes_per_second": ceiling}
        for name, call in implementations().items():
            try:
                found[name] = measure(call, given, ceiling)
            except Exception as error:  # a compiler that gives up must not lose the other figures
                found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        report["results"][str(dtype).removeprefix("torch.")] = found
    return report


def main() -> None:
    """Parse the command line, measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=32_768)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; torch.cuda.is_available() is False")
    report = run(options.rows, options.columns)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
