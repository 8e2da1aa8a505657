"""What ``snakemake --report`` holds: figures and tables by category, each with its caption."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.workflow.conftest import ROOT, Sweep

CAPTIONS = {
    "results/figures/pareto.png": ("Frontier", "pareto"),
    "results/figures/control_tiny.png": ("Course of training", "control"),
    "results/tables/frontier.html": ("Tables", "tables"),
    "results/tables/phases.html": ("Tables", "tables"),
}
"""Category and caption of each result that is always there."""


def variable(page: str, name: str) -> Any:
    """A variable of the page's program, which is written as JSON."""
    found = re.search(rf'<script id="[a-z-]+">\s+var {name} = (.*);\s+</script>', page)
    assert found is not None, name
    return json.loads(found[1])


def words(text: str) -> str:
    """Text without markup, in one line."""
    plain = re.sub(r"<[^>]+>|[`*]", "", text)
    return " ".join(plain.split())


def test_figures_and_tables_are_there_by_category_with_captions(finished: Sweep) -> None:
    done = finished.run("--report", "report.html")
    assert done.returncode == 0, done.stdout
    page = (finished.directory / "report.html").read_text(encoding="utf-8")
    results = variable(page, "results")
    categories = variable(page, "categories")
    assert set(categories) == {"Frontier", "Course of training", "Tables"}
    assert results.keys() == CAPTIONS.keys()
    for path, (category, caption) in CAPTIONS.items():
        listed = [file for group in categories[category].values() for file in group]
        assert path in str(listed)
        text = (ROOT / "workflow" / "report" / f"{caption}.rst").read_text(encoding="utf-8")
        assert words(text) in words(results[path]["caption"])
        assert results[path]["data_uri"].startswith("data:")
    # What opens in the report itself: the rest could only be downloaded.
    kinds = {results[path]["mime_type"] for path in CAPTIONS}
    assert kinds == {"image/png", "text/html"}
    description = (ROOT / "workflow" / "report" / "workflow.rst").read_text(encoding="utf-8")
    assert words(description.splitlines()[0]) in words(variable(page, "workflow_desc"))
