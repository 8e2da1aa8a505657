"""The bench measures what it says, at a size at which that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spalf.bench import end_to_end
from spalf.bench.problem import Pool, Shape, config_for, hold_at_target, run_on, train
from spalf.bench.report import write_report

CPU = torch.device("cpu")
SMALL = Shape(d_model=32, F=96, L0=4, batch=256)
LM = end_to_end.LMShape(layers=2, d_model=32, heads=2, d_vocab=128, layer=0)


def test_the_timed_run_is_at_its_target() -> None:
    config, pool = config_for(SMALL), Pool(SMALL, CPU)
    state, phase = run_on(config, pool)
    rows = train(state, phase, config, 20)
    assert [row["l0_ref"] for row in rows] == [SMALL.L0] * len(rows)
    assert rows[-1]["l0"] == pytest.approx(SMALL.L0, rel=0.5)


def test_what_is_timed_stays_at_its_target() -> None:
    config, pool = config_for(SMALL), Pool(SMALL, CPU)
    state, phase = run_on(config, pool)
    with torch.no_grad():
        state.sae.log_threshold += 0.5
    run = hold_at_target(state, phase, config, pool)
    before = state.step
    run(7)
    assert state.step == before + 7
    l0 = state.sae(pool.x, SMALL.L0).l0.mean().item()
    assert l0 == pytest.approx(SMALL.L0, rel=0.05)


@pytest.mark.filterwarnings("ignore")  # SAELens's own
def test_every_measurement_with_the_language_model_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(end_to_end, "SEQUENCES", 64)
    monkeypatch.setattr(end_to_end, "SETTLING_STEPS", 5)
    rows = list(end_to_end.measurements(LM, SMALL, CPU, steps=4))
    assert [(row["what"], row.get("cells"), row.get("overlap")) for row in rows] == [
        ("harvest", None, None),
        ("spalf", 1, False),
        ("spalf", 1, True),
        ("spalf", 5, False),
        ("spalf", 5, True),
        ("saelens jumprelu", 1, False),
        ("saelens jumprelu", 1, True),
    ]
    assert all(row["ms"] > 0 for row in rows[:5])


def test_the_report_draws_the_conclusions(tmp_path: Path) -> None:
    shape = {"d_model": 8, "F": 64, "L0": 4, "batch": 16}
    main = {"what": "spalf", "axis": "main", **shape, "ms": 4.0, "peak_gib": 1.0, "l0": 4.0}
    loop = {"axis": "end to end", **shape, "tokens_per_s": 1.0, "overlap": False}
    rows = [
        {
            "what": "ceilings",
            **shape,
            "product_ms": 1.0,
            "copy_bytes_per_s": 4e12,
            "floor_ms": 2.0,
            "entries_ms": 1.0,
        },
        {**main, "tokens_per_s": 4e3},
        {**main, "what": "saelens topk", "ms": 10.0, "tokens_per_s": 1.6e3},
        {**loop, "what": "spalf", "cells": 1, "ms": 5.0},
        {**loop, "what": "spalf", "cells": 5, "ms": 9.0},
        {**loop, "what": "saelens jumprelu", "cells": 1, "ms": 12.0},
    ]
    write_report(tmp_path, {"device": "a chip"}, rows)
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "at 0.50 of the floor; at 0.75 with" in text
    assert "2.40 times as long as one cell" in text
    assert "Five packed cells take 1.80 times" in text
    assert "2.50" in next(line for line in text.splitlines() if "saelens topk" in line)
    assert len(json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]) == 6
    assert (tmp_path / "bench.png").stat().st_size > 1000
