"""One look for every figure, and files whose bytes depend on nothing but the data."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from spalf.report.files import replacing

METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with every common form of colour blindness."""

METHOD_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
METHOD_LINES = ("-", "--", ":")
METHODS = ("spalf", "batchtopk", "topk", "jumprelu")
"""Methods that look the same in every figure; others take the colours that are left."""

RANDOM_LOOK: Mapping[str, Any] = {"color": "#666666", "marker": "x", "linestyle": ":"}
"""Of SAEs that nobody trained."""

NOTE_COLOUR = "#B00000"
"""Of what a figure says about missing results."""

PAGE_WIDTH = 6.5
"""Inches of text on the manuscript's page. Figures are this wide, so letters keep their size."""

ABREAST = 3
"""Panels that fit side by side on a page."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "figure.dpi": 100,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,
}

_UNDATED: dict[str, dict[str, Any]] = {
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".png": {"Software": None},
}


@contextmanager
def house_style() -> Iterator[None]:
    """The project's look, for the figures drawn and saved inside."""
    # From matplotlib's defaults, not from a user's matplotlibrc: figures must not depend on it.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def save(figure: Figure, stem: Path, note: str = "") -> list[Path]:
    """Save ``figure`` as ``<stem>.pdf`` and ``<stem>.png``, without a date.

    Args:
        figure: what was drawn.
        stem: path without a suffix, which may hold dots.
        note: what is missing; printed below the panels, in red.
    """
    if note:
        figure.supxlabel(note, fontsize=8, color=NOTE_COLOUR)
    written = []
    for suffix, metadata in _UNDATED.items():
        path = stem.with_name(f"{stem.name}{suffix}")
        # In memory first: on a full disk Matplotlib's PDF writer fails in more ways than one.
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix[1:], metadata=metadata)
        with replacing(path) as temporary:
            temporary.write_bytes(drawn.getvalue())
        written.append(path)
    return written


def looks(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and stroke of each line of a figure, by name.

    ``spalf`` and the baselines have the same look wherever they appear, and so have random SAEs.
    """
    names = list(dict.fromkeys(lines))
    others = [name for name in names if name not in METHODS and name != "random"]
    places = {name: index for index, name in enumerate([*METHODS, *others])}
    return {name: dict(RANDOM_LOOK) if name == "random" else _look(places[name]) for name in names}


def _look(index: int) -> dict[str, Any]:
    return {
        "color": METHOD_COLOURS[index % len(METHOD_COLOURS)],
        "marker": METHOD_MARKERS[index % len(METHOD_MARKERS)],
        "linestyle": METHOD_LINES[index // len(METHOD_COLOURS) % len(METHOD_LINES)],
    }


def legend_above(
    figure: Figure, panels: Iterable[Axes], columns: int = 6, title: str | None = None
) -> None:
    """One legend for all panels, above them; none where there is nothing to tell apart or say."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if len(entries) > 1 or title:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper center",
            ncols=min(len(entries), columns),
            title=title,
            title_fontsize=9,
        )


def sequential(n: int) -> list[Any]:
    """``n`` colours in order from dark to light, legible on white."""
    scale = mpl.colormaps["viridis"]
    return [scale(0.8 * i / max(1, n - 1)) for i in range(n)]


def by_target(targets: Iterable[float]) -> dict[float, Any]:
    """A colour for each L0 target, darker for a smaller one."""
    distinct = sorted(set(targets))
    return dict(zip(distinct, sequential(len(distinct)), strict=True))


def plain_log_axis(axis: Axis) -> None:
    """Label a logarithmic axis 0.2, 0.3, 0.5 or 8, 16, 32 and not in powers of ten."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 6, 8), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def octave_axis(axis: Axis) -> None:
    """Ticks of a logarithmic axis at powers of two."""
    axis.set_major_locator(LogLocator(base=2, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def label_l0(axes: Axes, targets: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at a few ``targets``, or at powers of two."""
    axes.set_xscale("log")
    octave_axis(axes.xaxis)
    if 0 < len(targets) <= 8:
        axes.set_xticks(list(targets), [f"{target:g}" for target in targets])
