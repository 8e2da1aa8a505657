"""Compile every launch of the Triton kernels for a GPU that need not be there.

``python -m tests.helpers_compile``, without TRITON_INTERPRET, goes through the functions that
launch kernels on tensors of the CPU, notes each launch instead of making it, compiles it for sm_90
and prints a JSON object: registers and stack of each, by name and parameters.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

WIDTHS = (64, 256, 1024, 2048)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launches:
    """Takes note of launches; each kernel with each kind of arguments once."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[ASTSource, int]] = {}

    def note(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Stands in for `JITFunction.run`."""
        warps = kwargs.pop("num_warps", 4)
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        types, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr:
                types[name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        shown = [given[k] if kind == "constexpr" else kind for k, kind in types.items()]
        label = f"{kernel.__name__}({', '.join(map(str, shown))}) with {warps} warps"
        self.seen[label] = (ASTSource(kernel, types, constants, attributes), warps)


def launch_everything(width: int, dtype: torch.dtype) -> None:
    """Call whatever launches a kernel, going there and back."""
    from spalf.kernels.autoencode import Parameters, Plan, autoencode
    from spalf.kernels.triton_adam import AdamScalars, adam, square_norms
    from spalf.kernels.triton_coactive import TritonCoactive
    from spalf.kernels.triton_error import TritonErrors
    from spalf.kernels.triton_jumprelu import TritonJumpReLU
    from spalf.kernels.triton_rows import add_rows, sort_places

    tokens, d_sae = 16, 128
    x = torch.randn(tokens, width)
    matrices = [torch.randn(d_sae, width, requires_grad=True) for _ in range(2)]
    vectors = [torch.ones(d_sae, requires_grad=True) for _ in range(2)]
    bias, bandwidth = torch.ones(width, requires_grad=True), torch.ones(d_sae)
    precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    for surrogate, centred in (("rectangle", False), ("moreau", True)):
        parameters = Parameters(matrices[0], *vectors, matrices[1], bias, bandwidth)
        ways = (surrogate, precision, "triton", tokens, "triton", 1024, centred)
        plan = Plan(*ways)  # type: ignore[arg-type]
        out = autoencode(x, parameters, plan)
        for features in (8, 128, 512):
            out.pre.strongest(4, features)
        (out.x_hat.sum() + out.l0.sum() + out.subthreshold.sum()).backward()
        pre = torch.randn(tokens, d_sae).to(dtype).requires_grad_()
        z, l0, sub = TritonJumpReLU.apply(pre, vectors[1], bandwidth, surrogate)
        (z.float().sum() + l0.sum() + sub.sum()).backward()
    error, _ = TritonErrors.apply(matrices[0][:tokens], x, 2.0, torch.eye(width), dtype)
    error.backward()
    for features in (8, 128, 512):
        together = torch.randn(2, features, 4, requires_grad=True)
        TritonCoactive.apply(together, torch.ones(2, features), 1e-24).backward()
    index = torch.arange(6).reshape(2, 3)
    add_rows(torch.zeros(d_sae, width), torch.ones(2, 3, width), sort_places(index, d_sae))
    scalars = AdamScalars(*torch.ones(4))
    weight = torch.randn(d_sae, width)
    moments = (torch.zeros_like(weight), torch.zeros_like(weight))
    square_norms(weight, weight, 3)
    adam(weight, weight, moments, scalars, (0.9, 0.99), 1e-8, 3, copy=weight.to(dtype))


def resources(source: ASTSource, warps: int) -> dict[str, int]:
    """Registers of a thread and the bytes of its stack, to which it spills."""
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [reader, "--dump-resource-usage", binary]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
    """Print what every launch compiles to."""
    launches = Launches()
    JITFunction.run = lambda kernel, *a, **k: launches.note(kernel, *a, **k)
    for width in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            launch_everything(width, dtype)
    json.dump({name: resources(*launch) for name, launch in launches.seen.items()}, sys.stdout)


if __name__ == "__main__":
    main()
