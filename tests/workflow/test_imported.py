"""SAEs of others in ``results/<model>/imported`` are evaluated and collected."""

from __future__ import annotations

import json
from pathlib import Path

from spalf.config import parse_sweep
from spalf.report.places import evaluations_of
from tests.workflow.conftest import Sweep


def put_sae(sweep: Sweep, name: str) -> Path:
    folder = sweep.directory / "results" / "tiny" / "imported" / name
    folder.mkdir(parents=True)
    for file in ("cfg.json", "sae_weights.safetensors"):
        (folder / file).write_text("theirs")
    known = {"config": {"F": 100, "L0_target": 20.0}}
    (folder / "metadata.json").write_text(json.dumps(known))
    return folder


def calls(sweep: Sweep, step: str) -> list[list[str]]:
    lines = (sweep.directory / "calls.tsv").read_text().splitlines()
    return [line.split("\t")[1:] for line in lines if line.split("\t")[0] == step]


def collected(sweep: Sweep) -> list[Path]:
    """What the last ``spalf aggregate``, after which nothing was evaluated, was told to read."""
    assert sweep.calls()[-1][0] == "aggregate"
    call = calls(sweep, "aggregate")[-1]
    grid = parse_sweep(json.loads(call[call.index("--settings") + 1]), "--settings")
    results = sweep.directory / "results"
    return [Path("results") / path.relative_to(results) for path in evaluations_of(grid, results)]


def test_imported_saes_join_the_sweep(sweep: Sweep) -> None:
    sweep.configure()
    folders = [put_sae(sweep, name) for name in ("their-topk", "gemma.scope")]
    done = sweep.run("--cores", "2", "results/tables/frontier.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    mine = [call for call in calls(sweep, "evaluate") if "--sae" in call]
    assert len(mine) == 2
    for folder, call in zip(sorted(folders), sorted(mine), strict=True):
        place = folder.relative_to(sweep.directory).as_posix()
        assert Path(place, "evaluation.json") in collected(sweep)
        assert call[call.index("--sae") + 1] == place
        assert call[call.index("--calibration") + 1] == "results/tiny/calibration"
        assert call[call.index("--model") + 1] == "tiny"
        settings = json.loads(call[call.index("--settings") + 1])
        assert (settings["F"], settings["L0_target"]) == (100, 20.0)
    assert len(calls(sweep, "calibrate")) == 1


def test_importing_one_more_trains_nothing_again(sweep: Sweep) -> None:
    sweep.configure()
    assert sweep.run("--cores", "2", "results/tables/frontier.csv").returncode == 0
    before = len(calls(sweep, "phase1"))
    put_sae(sweep, "late")
    assert sweep.run("--cores", "2", "results/tables/frontier.csv").returncode == 0
    assert len(calls(sweep, "phase1")) == before
    assert len(calls(sweep, "calibrate")) == 1
    assert len(calls(sweep, "aggregate")) == 2
    assert Path("results/tiny/imported/late/evaluation.json") in collected(sweep)
