"""Tables of text: each cell ready for the page, as CSV for the manuscript and as LaTeX."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

NONE = "–"
"""Shown where there is no number."""

_LATEX = {
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "…": r"\dots{}",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "Δ": r"$\Delta$",
    "λ": r"$\lambda$",
    "∫v²": r"$\int v^2$",
    "cos²": r"$\cos^2$",
    "R²": "$R^2$",
}
_NUMBER = re.compile(r"[\d−–×]|never")
_SPECIAL = re.compile(r"[&%$#_{}~^\\]")


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    name: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv`` and ``<name>.tex`` into ``folder``.

        The LaTeX is plain ASCII and needs the package booktabs.
        """
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])
        (folder / f"{self.name}.tex").write_text(self._latex(), encoding="ascii")

    def _latex(self) -> str:
        table = pd.DataFrame(
            [[latex(cell) for cell in row] for row in self.rows],
            columns=[latex(cell) for cell in self.header],
            dtype=str,
        )
        sides = "".join("r" if self._is_number(index) else "l" for index in range(len(self.header)))
        return table.style.hide(axis="index").to_latex(hrules=True, column_format=sides)

    def _is_number(self, column: int) -> bool:
        return bool(self.rows) and all(_NUMBER.match(row[column]) for row in self.rows)


def latex(text: str) -> str:
    """A cell's text for LaTeX, in ASCII."""
    text = _SPECIAL.sub(lambda found: _escaped(found[0]), text)
    for symbol, command in _LATEX.items():
        text = text.replace(symbol, command)
    return text.encode("ascii", "replace").decode("ascii")


def _escaped(character: str) -> str:
    return {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}.get(
        character, f"\\{character}"
    )


def number(value: Any, form: str = ".3f") -> str:
    """``value`` in the format ``form``; a dash where there is none."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    return format(int(value) if form.endswith("d") else value, form).replace("-", "−")


def spread(values: Iterable[Any], form: str = ".3f") -> str:
    """Mean ± standard deviation; only the number where there is one, a dash where there is none."""
    known = [float(v) for v in values if v is not None and not pd.isna(v)]
    if not known:
        return NONE
    mean = number(fmean(known), form)
    return mean if len(known) == 1 else f"{mean} ± {number(stdev(known), form)}"


def extent(values: Iterable[Any], form: str = ".2f") -> str:
    """Lowest to highest; only the number where they are equal as shown."""
    known = [float(v) for v in values if v is not None and not pd.isna(v)]
    if not known:
        return NONE
    low, high = number(min(known), form), number(max(known), form)
    return low if low == high else f"{low} to {high}"
