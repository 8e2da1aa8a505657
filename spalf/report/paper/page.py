"""The results as a page of Markdown, from the numbers, tables and figures of the manuscript."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spalf.report.paper.results import is_evaluation

DEMO = "config/config.yaml"
"""The grid that is meant to show that everything works, and nothing else."""

_DEMO_SAYS = (
    "This is the demo: small models, a budget for a laptop. Its dictionary sizes, learning rate "
    "and controller gains were chosen on these same held-out tokens, so it shows that everything "
    "works, not what to expect elsewhere."
)
_ROWS = 40
"""Longer tables are left to the files beside the manuscript."""

_SECTIONS: Sequence[tuple[str, str, Sequence[str], Sequence[str]]] = (
    (
        "Frontier",
        "The final SAEs on held-out tokens, `random` those that nobody trained. Points are means "
        "over seeds, error bars and ± one standard deviation over seeds; with one seed there are "
        "no error bars and ± is one standard error over sequences. EV: explained variance; ΔCE and "
        "KL in nats per token.",
        ("pareto",),
        ("frontier",),
    ),
    (
        "Thresholds scaled",
        "One line an SAE, its marker the SAE as trained; dotted: random SAEs. No error bars: each "
        "line is one SAE.",
        ("sweep",),
        (),
    ),
    (
        "Against the baselines",
        "First SPALF and its variants beside the best baseline at the L0 they came to: means over "
        "seeds, the baselines' curves interpolated in log L0 (ΔCE in its logarithm); how far L0 is "
        "off and dead features are the largest over seeds. Then ΔCE of each baseline over that of "
        "SPALF's own frontier at the same L0: geometric mean, lowest, highest over SAEs. Last what "
        "each baseline was trained with.",
        (),
        ("best_baseline", "comparison", "settings"),
    ),
    (
        "Against chance",
        "The mean of each measure over SAEs, and how many of them beat the random SAE of the same "
        "model, L0 and seed.",
        (),
        ("sanity",),
    ),
    (
        "Phases",
        "At the end of Phase 1 and of Phase 2; ratio: ΔCE after Phase 2 over ΔCE after Phase 1.",
        (),
        ("phases",),
    ),
    (
        "Ablations",
        "SPALF changed in one thing: ΔCE over that of SPALF itself at the same L0. A point an SAE.",
        ("ablations",),
        ("ablations",),
    ),
    (
        "Sensitivity",
        "One constant or the learning rate changed by a factor. A point an SAE; error bars of the "
        "learning rates are one standard deviation over seeds.",
        ("constants", "rates"),
        ("sensitivity",),
    ),
    (
        "Controller",
        "L0 with its target, multiplier and violation of fidelity over both phases, one line an "
        "SAE. λ at the end of Phase 1 should be near the slope −d log L0 / d log MSE; at rest it "
        "equals that of the error in the metric of training.",
        ("courses", "elasticity"),
        ("control",),
    ),
    (
        "Dictionaries",
        "Cosine of each decoder column with its nearest neighbour, and d times the mean cos² over "
        "pairs, which is 1 for isotropic directions.",
        ("neighbours",),
        ("dictionary", "drift"),
    ),
    (
        "Seeds",
        "PW-MCC: mean over features of the largest cosine in the dictionary of another seed. ± and "
        "error bars: one standard deviation over pairs of seeds.",
        ("consistency",),
        ("consistency",),
    ),
    (
        "Probing",
        "Balanced accuracy (chance 0.5) of probes of one and of five features. Error bars: lowest "
        "to highest over L0 targets and seeds; black: probes of all of the activation.",
        ("probing",),
        ("probing",),
    ),
    (
        "Absorption",
        "First-letter absorption on the model's own vocabulary, or why it was not measured.",
        (),
        ("absorption", "absorption_skipped"),
    ),
    (
        "Cost",
        "Minutes and memory of the steps as the workflow's benchmarks have them, on the machine "
        "above with whatever else it was doing.",
        (),
        ("cost",),
    ),
    ("Missing", "Results of the grid that were not there.", (), ("missing",)),
)


def results_page(folder: Path, images: str) -> str:
    """The page of results.

    Args:
        folder: holds ``numbers.json`` and ``tables/*.csv`` as `build_paper` wrote them.
        images: where the page finds the PNG files of the figures.
    """
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    config = numbers["built"]["config"]
    title = f"# Results of {config}" if config else "# Results"
    parts = [title, *_head(numbers), *_grid(numbers)]
    for title, text, figures, tables in _SECTIONS:
        shown = [_image(name, images) for key in figures for name in numbers["figures"][key]]
        shown += [made for name in tables if (made := _table(folder / "tables" / f"{name}.csv"))]
        if shown:
            parts += [f"## {title}", text, *shown]
    return "\n\n".join(parts) + "\n"


def _head(numbers: dict[str, Any]) -> list[str]:
    built, counts = numbers["built"], numbers["counts"]
    missing = len(counts["missing"])
    rule = "paper_partial" if missing else "paper"
    packages = ", ".join(" ".join(pair) for pair in built["packages"])
    lines = [
        f"Written by `python -m workflow.scripts.write_results_page` from what "
        f"`snakemake --configfile {built['config']} -- {rule}` made: {counts['saes']} SAEs, "
        f"commit `{built['commit']}`, on {built['device']} ({built['machine']}), Python "
        f"{built['python']}, {packages}. Nothing on this page is typed by hand but the words. "
        "`spalf provenance` says of each file what it was made from.",
    ]
    lines += [_DEMO_SAYS] if built["config"] == DEMO else []
    if missing:
        compared = sum(not is_evaluation(name) for name in counts["missing"])
        which = "all" if compared == missing else str(compared)
        which = f", {which} of them comparisons of seeds" if compared else ""
        lines.append(f"**Incomplete**: {missing} of {counts['expected']} results missing{which}.")
    sanity = numbers["sanity"]
    if sanity["total"] != "0":
        lost = f" Not won: {'; '.join(sanity['lost'])}." if sanity["lost"] else ""
        lines.append(
            f"Of {sanity['total']} comparisons with random SAEs of the same model, L0 and seed the "
            f"trained ones win {sanity['won']}.{lost}"
        )
    return lines


def _grid(numbers: dict[str, Any]) -> list[str]:
    header = ("model", "weights", "site", "F", "lr", "tokens", "batch", "held-out tokens")
    return [_markdown([list(header), *numbers["grid"]["models"]])]


def _image(name: str, images: str) -> str:
    stem = Path(name).stem
    return f"![{stem}]({images}/{stem}.png)"


def _table(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        return ""
    if len(rows) > _ROWS:
        return f"The table of {len(rows) - 1} rows is `tables/{path.name}` beside the manuscript."
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
