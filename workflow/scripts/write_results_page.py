"""Write ``docs/results.md`` from a manuscript's numbers, tables and figures.

Example: python -m workflow.scripts.write_results_page results/paper
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from spalf.report.paper.page import results_page

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = "results"
"""Below the documentation: the numbers and tables that the page is written from."""

IMAGES = "images/results"


def write(paper: Path, docs: Path = DOCS) -> Path:
    """Copy what the page needs from a manuscript's folder into ``docs``, and write the page.

    Args:
        paper: folder that ``spalf paper`` wrote.
        docs: the documentation.

    Returns:
        The page.
    """
    for target in (docs / SOURCES, docs / IMAGES):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    shutil.copyfile(paper / "numbers.json", docs / SOURCES / "numbers.json")
    (docs / SOURCES / "tables").mkdir()
    for table in sorted((paper / "tables").glob("*.csv")):
        shutil.copyfile(table, docs / SOURCES / "tables" / table.name)
    for picture in sorted((paper / "figures").glob("*.png")):
        shutil.copyfile(picture, docs / IMAGES / picture.name)
    page = docs / "results.md"
    page.write_text(results_page(docs / SOURCES, IMAGES), encoding="utf-8")
    return page


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paper", type=Path, help="folder of the manuscript, results/paper")
    write(parser.parse_args().paper)


if __name__ == "__main__":
    main()
