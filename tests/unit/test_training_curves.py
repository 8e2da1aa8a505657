"""Whole runs on lists of entries and on dense products: the same curve up to rounding.

On a GPU the lists are Triton's and the step is replayed from a graph; elsewhere they are PyTorch's.
"""

from __future__ import annotations

import pytest
import torch

from spalf.bench.problem import Pool, Shape, config_for, run_on, train

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu if ON_GPU else []
SHAPE = Shape(256, 8192, 32, 4096) if ON_GPU else Shape(32, 512, 4, 256)
STEPS = 500 if ON_GPU else 200


def curve(precision: str, kernel: str) -> list[dict[str, float]]:
    config = config_for(SHAPE, precision, kernel)
    pool = Pool(SHAPE, torch.device("cuda" if ON_GPU else "cpu"))
    return train(*run_on(config, pool), config, STEPS)


def gap(one: list[dict[str, float]], two: list[dict[str, float]], name: str) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a[name] / b[name] - 1) for a, b in zip(one, two, strict=True))


def test_lists_and_dense_products_train_alike() -> None:
    lists, dense = curve("float32", "auto"), curve("float32", "reference")
    assert len(lists) >= STEPS // 10
    # A gate that opens a step earlier is a rounding error too: curves part slowly.
    assert gap(lists[:5], dense[:5], "mse") < 1e-4
    assert gap(lists, dense, "mse") < 0.01
    assert gap(lists, dense, "l0") < 0.02


@pytest.mark.skipif(not ON_GPU, reason="bfloat16 operands are for a GPU")
def test_kernels_in_bfloat16_err_no_more_than_bfloat16() -> None:
    exact, kernels, plain = (
        curve(*how)
        for how in (("float32", "reference"), ("bfloat16", "auto"), ("bfloat16", "reference"))
    )
    for name in ("mse", "l0"):
        assert gap(kernels, exact, name) <= 2 * gap(plain, exact, name) + 0.005
