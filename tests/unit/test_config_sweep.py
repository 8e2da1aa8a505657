"""Baselines and variants as cells of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spalf.config import SweepConfig, parse_sweep
from spalf.errors import UserError
from spalf.report.status import sweep_status

SWEEP: dict[str, Any] = {
    "models": {"m": {"model_name": "spalf/demo-2l", "hook_point": "h", "train": {"lr": 0.01}}},
    "dataset": "python-stdlib",
    "grid": {"L0_target": [4, 8], "seed": [0]},
    "train": {"F": 64, "lr": 0.001, "total_tokens": 100_000, "batch_size": 512},
}


def sweep(**changes: Any) -> SweepConfig:
    return parse_sweep({**SWEEP, **changes}, "sweep.yaml")


def places(config: SweepConfig) -> list[str]:
    return [cell.place for cell in config.cells()]


def test_by_default_there_is_spalf_alone() -> None:
    assert places(sweep()) == ["m/L0_4/seed_0", "m/L0_8/seed_0"]


def test_methods_and_variants_have_the_grid_once_more() -> None:
    config = sweep(methods=["spalf", "topk"], variants={"v": {"method": {"capu": False}}})
    expected = [f"m/{series}L0_{l0}/seed_0" for series in ("", "v/", "topk/") for l0 in (4, 8)]
    assert places(config) == expected


def test_a_variant_changes_what_it_names_and_nothing_else() -> None:
    changes = {"method": {"capu": False}, "constants": {"kappa": 50}, "train": {"lr": 0.1}}
    config = sweep(method={"anchors": False}, variants={"v": changes})
    plain, *_, varied = (config.run_config(cell) for cell in config.cells() if cell.L0_target == 8)
    assert (plain.lr, varied.lr) == (0.01, 0.1)
    assert (varied.method.capu, varied.method.anchors) == (False, False)
    assert varied.constants.kappa == 50
    back = {"method": plain.method, "constants": plain.constants, "lr": plain.lr}
    assert varied.model_copy(update=back) == plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {"v": {"train": {"L0_target": 3}}}}, "variants.v.train: 'L0_target' cannot"),
        ({"variants": {"v": {"train": {"lr": -1}}}}, "variants.v: lr = -1"),
        ({"variants": {"imported": {}}}, "cannot be called 'imported'"),
        ({"variants": {"v": {}}, "methods": ["topk"]}, "add it to methods"),
        ({"methods": ["topk"], "grid": {"L0_target": [4.5]}}, "whole number"),
        ({"methods": []}, "methods"),
        ({"grid": {"L0_target": [8, 4, 8]}}, "8.0 and 8.0 are both called 8"),
        ({"grid": {"L0_target": [8, 8.0000001]}}, "8.0 and 8.0000001 are both called 8"),
        ({"grid": {"L0_target": [8], "seed": [0, 1, 0]}}, "grid.seed = [0, 1, 0]: 0 and 0"),
        ({"baselines": {"lrs": []}}, "baselines.lrs"),
        ({"baselines": {"lr": [0.1]}}, "did you mean 'lrs'"),
    ],
)
def test_a_fault_names_its_place(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep(**changes)
    assert words in str(caught.value)


def test_status_knows_baselines_and_variants(tmp_path: Path) -> None:
    log = tmp_path / "m" / "topk" / "L0_8" / "seed_0" / "logs" / "baseline.log"
    log.parent.mkdir(parents=True)
    log.write_text("job 12 on node1, now\nspalf: sae-lens: missing\n")
    done = tmp_path / "m" / "v" / "L0_8" / "seed_0" / "evaluation.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    found = {(status.cell, status.step): status.state for status in sweep_status(tmp_path)}
    assert found == {
        ("m topk L0_8 seed_0", "baseline"): "stopped",
        ("m v L0_8 seed_0", "evaluate"): "done",
    }
