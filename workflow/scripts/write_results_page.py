"""Write a page of results, ``docs/results.md`` or another, from a manuscript's numbers and figures.

Example: python -m workflow.scripts.write_results_page results/paper --name results-sensitivity
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from spalf.report.paper.page import results_page

DOCS = Path(__file__).parents[2] / "docs"


def write(paper: Path, docs: Path = DOCS, name: str = "results") -> Path:
    """Copy what the page needs from a manuscript's folder into ``docs``, and write the page.

    Args:
        paper: folder that ``spalf paper`` wrote.
        docs: the documentation.
        name: of the page, of the folder of numbers and tables beside it, and of its images.

    Returns:
        The page.
    """
    sources, images = docs / name, docs / "images" / name
    # What else lies beside the numbers, such as an archive of the reports, is not this page's.
    for target in (sources / "tables", images):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    shutil.copyfile(paper / "numbers.json", sources / "numbers.json")
    for table in sorted((paper / "tables").glob("*.csv")):
        shutil.copyfile(table, sources / "tables" / table.name)
    page = docs / f"{name}.md"
    page.write_text(results_page(sources, f"images/{name}"), encoding="utf-8")
    for picture in sorted((paper / "figures").glob("*.png")):
        if f"/{picture.name})" in page.read_text(encoding="utf-8"):
            shutil.copyfile(picture, images / picture.name)
    return page


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paper", type=Path, help="folder of the manuscript, results/paper")
    parser.add_argument("--name", default="results", help="of the page (default: results)")
    given = parser.parse_args()
    if not (given.paper / "numbers.json").is_file():
        parser.error(f"{given.paper} holds no numbers.json: give what `spalf paper` wrote")
    write(given.paper, name=given.name)


if __name__ == "__main__":
    main()
