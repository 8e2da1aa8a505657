"""Properties of JumpReLU for any shape and any values (M4, M6); the kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spalf.kernels import jumprelu

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Drawn:
    """A random call: values on a coarse grid, so that ties and window edges are common."""

    def __init__(self, rows: int, columns: int, seed: int, surrogate: str, low: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def grid(*size: int, start: int, stop: int) -> Tensor:
            return (torch.randint(start, stop, size, generator=generator) / 8).to(DEVICE)

        self.dtype = torch.bfloat16 if low else torch.float32
        self.surrogate = surrogate
        self.pre = grid(rows, columns, start=-16, stop=17).to(self.dtype)
        self.threshold = grid(columns, start=-4, stop=13)
        self.bandwidth = grid(columns, start=0, stop=9)
        self.back = [
            grid(rows, columns, start=-8, stop=9).to(self.dtype),
            grid(rows, start=-8, stop=9),
            grid(rows, start=-8, stop=9),
        ]

    def call(self, implementation: str) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [self.pre.clone().requires_grad_(), self.threshold.clone().requires_grad_()]
        outputs = jumprelu(*inputs, self.bandwidth, self.surrogate, implementation=implementation)
        return list(outputs), list(torch.autograd.grad(outputs, inputs, self.back))


calls = st.builds(
    Drawn,
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    surrogate=st.sampled_from(["rectangle", "moreau"]),
    low=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(calls)
def test_reference_gates_split_the_positive_mass(drawn: Drawn) -> None:
    (z, l0, sub), (d_pre, _) = drawn.call("reference")
    pre = drawn.pre.float()
    gate = pre > drawn.threshold
    assert torch.equal(z, torch.where(gate, drawn.pre, 0))
    assert torch.equal(l0, gate.sum(1).float())
    # On the grid every square is a multiple of 1/64, so these float32 sums are exact.
    kept = (z.float().relu() ** 2).sum(1)
    assert torch.equal(kept + sub, (pre.relu() ** 2).sum(1))
    assert torch.equal(d_pre[gate], drawn.back[0][gate])


@settings(max_examples=25, deadline=None)
@given(calls)
def test_i3_kernel_agrees_with_reference(drawn: Drawn) -> None:
    (outputs, gradients), (known, known_gradients) = drawn.call("triton"), drawn.call("reference")
    for found, expected in zip(outputs, known, strict=True):
        assert torch.equal(found, expected)
    # Gradients of pre are sums of a few grid values: exact, so rounding is the same everywhere.
    rtol = torch.finfo(drawn.dtype).eps
    torch.testing.assert_close(gradients[0], known_gradients[0], rtol=rtol, atol=0)
    # Each term of a column's sum is below 2·scale·8·(1 + θ²) and carries a few roundings.
    scale = torch.where(drawn.bandwidth > 0, 2 / drawn.bandwidth.square() + 1, 0)
    bound = len(drawn.pre) * scale * 8 * (1 + drawn.threshold.square())
    error = (gradients[1] - known_gradients[1]).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * bound).all()
