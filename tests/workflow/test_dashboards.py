"""The pages of features: made when they are asked for, one per cell, and in the report."""

from __future__ import annotations

import json

from tests.workflow.conftest import Sweep

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
