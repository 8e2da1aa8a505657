"""SAEs trained together on one GPU end where each would have ended alone, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spalf.bench.problem import Pool, Shape, config_for, quiet, run_on
from spalf.training.loop import PhaseRun, run_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = Shape(d_model=256, F=4096, L0=32, batch=2048)
STEPS = 230
"""Past two refreshes of the bandwidth, which wait for the device."""


def weights_of(targets: list[float], pool: Pool) -> list[list[torch.Tensor]]:
    """Weights and setpoint of one SAE for each target, trained together."""
    runs = []
    for target in targets:
        config = config_for(replace(SHAPE, L0=target), lr=2e-3)
        state, phase = run_on(config, pool)
        short = replace(phase, last_step=state.step + STEPS, may_converge=False)
        runs.append(PhaseRun(state, short, config, quiet([])))
    assert not run_together(runs)
    torch.cuda.synchronize()
    return [
        [
            t.detach().clone()
            for t in (
                run.state.sae.W_dec,
                run.state.sae.W_enc,
                run.state.sae.log_threshold,
                run.state.controller.log_tau,
            )
        ]
        for run in runs
    ]


@pytest.mark.parametrize("cells", [3, 12])
def test_together_as_alone(cells: int) -> None:
    """Twelve record on more streams than torch has before the first comes again."""
    pool = Pool(SHAPE, torch.device("cuda"))
    targets = [8.0 * 1.3**index for index in range(cells)]
    together = weights_of(targets, pool)
    for target, got in zip(targets, together, strict=True):
        (alone,) = weights_of([target], pool)
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), target
