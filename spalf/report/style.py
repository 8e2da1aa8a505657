"""One look for every figure, and files whose bytes depend on nothing but the data."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
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

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.dpi": 100,
    "savefig.dpi": 200,
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


def save(figure: Figure, path: Path) -> Path:
    """Save ``figure`` in the format of ``path``'s suffix, without a date."""
    # In memory first: on a full disk Matplotlib's PDF writer fails in more ways than one.
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], metadata=_UNDATED[path.suffix])
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getvalue())
    return path


def sequential(n: int) -> list[Any]:
    """``n`` colours in order from dark to light, legible on white."""
    scale = mpl.colormaps["viridis"]
    return [scale(0.85 * i / max(1, n - 1)) for i in range(n)]


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
