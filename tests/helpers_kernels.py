"""What the tests of kernels share; a plain module, as they also run where no conftest is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every buffer that `torch.empty` hands out starts as NaN, so an unwritten element shows.

    An operation that is not repeatable raises.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
