"""The pages of features: made when they are asked for, one per cell, and in the report."""

from __future__ import annotations

import json

from tests.workflow.conftest import Sweep
from tests.workflow.test_imported import put_sae

PAGE = "results/tiny/L0_4/seed_0/dashboard.html"


def test_pages_are_made_on_demand_only(finished: Sweep) -> None:
    assert finished.planned() == {}
    assert finished.planned("--", "dashboards") == {"dashboard": 2, "dashboards": 1}
    assert finished.planned("--", PAGE) == {"dashboard": 1}


def test_the_command_gets_the_files_of_its_cell(finished: Sweep) -> None:
    result = finished.run("--quiet", "all", "--", "dashboards")
    assert result.returncode == 0, result.stdout
    calls = [call for call in finished.calls() if call[0] == "dashboard"]
    assert len(calls) == 2
    call = next(call for call in calls if call[-1] == PAGE)
    options = dict(zip(call[1::2], call[2::2], strict=True))
    cell = "results/tiny/L0_4/seed_0"
    assert json.loads(options.pop("--settings"))["L0_target"] == 4
    assert options == {
        "--if-locked": "wait",
        "--runtime": '{"device":"cpu"}',
        "--model": "tiny",
        "--calibration": "results/tiny/calibration",
        "--phase1": f"{cell}/phase1",
        "--phase2": f"{cell}/phase2",
        "--evaluation": f"{cell}/evaluation.json",
        "--frontier": "results/tables/frontier.csv",
        "--out": PAGE,
    }
    assert finished.planned("--", "dashboards") == {}
    # Its number of tokens is a setting of the page; the thresholds swept in evaluation are not.
    finished.configure(evaluate={"tokens": 4096})
    assert finished.planned("--", "dashboards")["dashboard"] == 2


def test_a_page_is_in_the_report_by_category(finished: Sweep) -> None:
    finished.run("--quiet", "all", "--", "dashboards")
    result = finished.run("--report", "report.html", "--", "dashboards")
    assert result.returncode == 0, result.stdout
    report = (finished.directory / "report.html").read_text(encoding="utf-8")
    assert '"Features"' in report
    assert "dashboard.html" in report


def test_baselines_and_imported_saes_have_pages_too(sweep: Sweep) -> None:
    sweep.configure(methods=["spalf", "topk"], grid={"L0_target": [4]})
    put_sae(sweep, "theirs")
    wanted = {"dashboard": 1, "dashboard_baseline": 1, "dashboard_imported": 1, "dashboards": 1}
    assert sweep.planned("--", "dashboards").items() >= wanted.items()
    result = sweep.run("--quiet", "all", "--cores", "2", "--", "dashboards")
    assert result.returncode == 0, result.stdout
    calls = [call for call in sweep.calls() if call[0] == "dashboard" and "--sae" in call]
    found = {call[-1]: dict(zip(call[1::2], call[2::2], strict=True)) for call in calls}
    places = {
        "results/tiny/topk/L0_4/seed_0": ("baseline", 4),
        "results/tiny/imported/theirs": ("", 20.0),
    }
    assert found.keys() == {f"{place}/dashboard.html" for place in places}
    for place, (inside, target) in places.items():
        options = found[f"{place}/dashboard.html"]
        assert options["--sae"] == f"{place}/{inside}".rstrip("/")
        assert options["--evaluation"] == f"{place}/evaluation.json"
        assert options["--calibration"] == "results/tiny/calibration"
        assert json.loads(options["--settings"])["L0_target"] == target
    report = sweep.run("--report", "report.html", "--", "dashboards")
    assert report.returncode == 0, report.stdout
