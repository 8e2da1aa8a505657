"""The CSV tables again as Markdown, LaTeX (booktabs) and HTML, rounded for a reader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spalf.report.files import replacing
from spalf.report.records import read_frontier


@dataclass(frozen=True)
class _Column:
    """How one column is shown: its header in both formats and its number format."""

    markdown: str
    latex: str
    number: str = ""


COLUMNS = {
    "model": _Column("model", "model"),
    "hook_point": _Column("site", "site"),
    "method": _Column("method", "method"),
    "variant": _Column("variant", "variant"),
    "phase": _Column("phase", "phase"),
    "L0_target": _Column("L0 target", "$L_0$ target", "{:g}"),
    "seed": _Column("seed", "seed", "{:d}"),
    "l0": _Column("L0", "$L_0$", "{:.2f}"),
    "explained_variance": _Column("explained variance", "EV", "{:.4f}"),
    "ce_clean": _Column("CE clean", r"CE\textsubscript{clean}", "{:.4f}"),
    "ce_sae": _Column("CE SAE", r"CE\textsubscript{SAE}", "{:.4f}"),
    "delta_ce": _Column("ΔCE", r"$\Delta$CE", "{:.4f}"),
    "ce_recovered": _Column("CE recovered", "CE rec.", "{:.4f}"),
    "kl": _Column("KL", "KL", "{:.4f}"),
    "dead_fraction": _Column("dead", "dead", "{:.3f}"),
    "lambda_faith": _Column("λ faith", r"$\lambda_\text{faith}$", "{:.2f}"),
    "tokens": _Column("tokens", "tokens", "{:d}"),
    "lr": _Column("lr", "lr", "{:g}"),
    "hyperparameters": _Column("hyper-parameters", ""),
}
"""The columns that are shown, in this order, where the table has them and they are not empty; in
LaTeX, where a page has a width, those with a header there."""


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; white-space: nowrap; }}
th {{ border-bottom: 1px solid; }}
{right} {{ text-align: right; }}
</style>
{table}
</html>
"""


def write_tables(tables: Iterable[Path], out_dir: Path) -> list[Path]:
    """Write ``<name>.md``, ``.tex`` and ``.html`` into ``out_dir`` for each CSV table.

    The LaTeX needs the packages booktabs and amsmath. The HTML is a page of its own.

    Returns:
        The paths written.

    Raises:
        UserError: a table is missing or damaged.
    """
    read = [(path, read_frontier(path)) for path in tables]
    written = []
    for path, table in read:
        shown = table[[name for name in COLUMNS if _says_something(table, name)]]
        texts = {"md": _markdown(shown), "tex": _latex(shown), "html": _html(shown, path.stem)}
        for suffix, text in texts.items():
            target = out_dir / f"{path.stem}.{suffix}"
            with replacing(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(target)
    return written


def _says_something(table: pd.DataFrame, name: str) -> bool:
    """Whether the table has the column, and in it more than blanks; a rate if it was chosen."""
    if name == "lr":
        return name in table and _says_something(table, "hyperparameters")
    return name in table and bool((table[name].notna() & (table[name] != "")).any())


def _formatted(table: pd.DataFrame) -> pd.DataFrame:
    """Every value as text, a missing one as a dash."""
    return pd.DataFrame(
        {name: [_value(column, value) for value in table[name]] for name, column in _of(table)},
        dtype=str,
    )


def _of(table: pd.DataFrame) -> list[tuple[str, _Column]]:
    return [(str(name), COLUMNS[str(name)]) for name in table.columns]


def _value(column: _Column, value: Any) -> str:
    if pd.isna(value) or value == "":
        return "–"
    return column.number.format(value) if column.number else str(value)


def _align(table: pd.DataFrame) -> list[str]:
    return ["right" if column.number else "left" for _, column in _of(table)]


def _headed(table: pd.DataFrame) -> pd.DataFrame:
    """Every value as text, under the headers that are read outside LaTeX."""
    headers = {name: column.markdown for name, column in _of(table)}
    return _formatted(table).rename(columns=headers)


def _markdown(table: pd.DataFrame) -> str:
    text = _headed(table).to_markdown(index=False, disable_numparse=True, colalign=_align(table))
    return f"{text}\n"


def _html(table: pd.DataFrame, title: str) -> str:
    numbers = [i for i, side in enumerate(_align(table), start=1) if side == "right"]
    right = ", ".join(f"tr > :nth-child({i})" for i in numbers)
    return _PAGE.format(
        title=title, right=right, table=_headed(table).to_html(index=False, border=0)
    )


def _latex(table: pd.DataFrame) -> str:
    table = table[[name for name, column in _of(table) if column.latex]]
    styler = _formatted(table).style.format(escape="latex").hide(axis="index")
    styler = styler.format_index(lambda name: COLUMNS[str(name)].latex, axis="columns")
    columns = "".join(side[0] for side in _align(table))
    return styler.to_latex(hrules=True, column_format=columns).replace("–", "--")
