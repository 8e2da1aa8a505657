"""What every figure must have: units, letters one can read, colours one can tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from spalf.config import load_sweep
from spalf.report import files, style
from spalf.report.aggregate import aggregate
from spalf.report.figures import control_figure, pareto_figures
from spalf.report.paper import build
from spalf.report.paper.comparisons import changes, ratios
from tests.workflow import synthetic

ROOT = Path(__file__).parents[2]
GRID = """
models:
  a: {model_name: spalf/demo-2l, hook_point: blocks.1.hook_resid_post}
  b: {model_name: spalf/demo-4l, hook_point: blocks.2.hook_resid_post}
  c: {model_name: spalf/demo-4l, hook_point: blocks.1.hook_resid_post}
  d: {model_name: spalf/demo-4l, hook_point: blocks.0.hook_resid_post}
dataset: python-stdlib
methods: [spalf, batchtopk, topk, jumprelu, random]
grid: {L0_target: [8, 16, 32], seed: [0, 1]}
train: {F: 256, total_tokens: 65536, batch_size: 512, seq_len: 64}
variants:
  no-capu: {method: {capu: false}}
  kappa-half: {constants: {kappa: 50}}
  lr-double: {train: {lr: 0.0006}}
"""
SMALLEST_LETTERS = 7.0
"""Points, at the size that is printed."""

Drawn = dict[str, Figure]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    """Every figure there is, by name, not written to files; a result of the grid is missing."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "grid.yaml").write_text(GRID, encoding="utf-8")
    sweep = load_sweep(folder / "grid.yaml")
    synthetic.write_sweep(folder, sweep)
    (folder / "a/topk/L0_8/seed_1/evaluation.json").unlink()
    found: Drawn = {}

    latest: list[Figure] = []

    def keep(figure: Figure, *_: Any, **__: Any) -> None:
        latest[:] = [figure]

    def replacing(path: Path) -> AbstractContextManager[Path]:
        found[f"{path.parent.name}/{path.name.split('.')[0]}"] = latest[0]
        return files.replacing(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        patch.setattr(style, "replacing", replacing)
        read = build._read(sweep, folder, partial=True)
        build._draw(read, ratios(read.table), changes(sweep), folder / "paper")
        frontier, _ = aggregate(sorted(folder.rglob("evaluation.json")), folder)
        pareto_figures(frontier, folder / "report")
        logs = sorted((folder / "a").glob("L0_*/seed_*/phase*/metrics.jsonl"))
        control_figure("a", logs, folder / "report")
    yield found


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def test_every_figure_is_looked_at(drawn: Drawn) -> None:
    wanted = {"pareto", "sweep", "ablations", "constants", "rates", "elasticity", "consistency"}
    wanted |= {"probing", "neighbours", "course_a", "course_d", "pareto_2", "sweep_2"}
    assert {f"paper/{name}" for name in wanted} <= drawn.keys()
    assert {"report/pareto", "report/control_a"} <= drawn.keys()


def test_every_axis_says_what_it_is_and_in_which_unit(drawn: Drawn) -> None:
    for name, figure in drawn.items():
        every = panels(figure)
        for axes, side in itertools.product(every, ("x", "y")):
            label = getattr(axes, f"get_{side}label")()
            if not label:
                shared = getattr(axes, f"get_shared_{side}_axes")().get_siblings(axes)
                labels = {getattr(other, f"get_{side}label")() for other in shared} - {""}
                assert len(labels) == 1, f"{name}: {side} of {axes.get_title()!r}"
                label = labels.pop()
            is_named = label in ("variant", "question about a token")
            assert is_named or label.endswith(")"), f"{name}: {label}"


def test_letters_can_be_read_at_the_width_of_the_page(drawn: Drawn) -> None:
    for name, figure in drawn.items():
        assert figure.get_figwidth() <= style.PAGE_WIDTH, name
        figure.draw_without_rendering()
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip():
                assert text.get_fontsize() >= SMALLEST_LETTERS, f"{name}: {text.get_text()!r}"


def test_no_label_lies_on_another(drawn: Drawn) -> None:
    """Titles, axis labels, legends and notes of a figure, which matplotlib lays out itself."""
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        texts = [text for text in figure.texts if text.get_text()]
        for axes in panels(figure):
            texts += [t for t in (axes.title, axes.xaxis.label, axes.yaxis.label) if t.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for one, two in itertools.combinations(boxes, 2):
            assert not one.shrunk(0.98, 0.9).overlaps(two.shrunk(0.98, 0.9)), name


def test_nothing_is_cut_off(drawn: Drawn) -> None:
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        width, height = figure.bbox.width, figure.bbox.height
        for axes in panels(figure):
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
                if text.get_text():
                    box = text.get_window_extent()
                    assert box.x0 >= -1 and box.x1 <= width + 1, f"{name}: {text.get_text()}"
                    assert box.y0 >= -1 and box.y1 <= height + 1, f"{name}: {text.get_text()}"


def test_figures_of_a_partial_manuscript_say_so(drawn: Drawn) -> None:
    """An evaluation is missing; seeds are compared by files of their own, which are all there."""
    for name, figure in drawn.items():
        notes = [text for text in figure.texts if "1 of" in text.get_text()]
        of_evaluations = name.startswith("paper/") and not name.startswith("paper/consistency")
        assert len(notes) == of_evaluations, name
        assert all(note.get_color() == style.NOTE_COLOUR for note in notes)


def test_a_line_is_a_method_wherever_it_is_drawn() -> None:
    few, many = style.looks(["topk", "random"]), style.looks(["spalf", "x", "topk", "random"])
    assert few["topk"] == many["topk"]
    assert few["random"]["color"] == style.RANDOM_LOOK["color"]
    names = ["spalf", "batchtopk", "topk", "jumprelu", *map(str, range(14))]
    assert len({tuple(look.items()) for look in style.looks(names).values()}) == len(names)


# Machado, Oliveira and Fernandes 2009: dichromats, on linear RGB.
SIGHT = {
    "everyone": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def lab(colour: Any, sight: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as it is seen."""
    srgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(sight @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(
    "colours",
    [[*style.METHOD_COLOURS[:4], style.RANDOM_LOOK["color"]], style.sequential(5)],
    ids=["methods", "L0 targets"],
)
def test_colours_can_be_told_apart(colours: list[Any], sight: str) -> None:
    """A difference of 10 is one that nobody overlooks in lines side by side."""
    seen = [lab(colour, SIGHT[sight]) for colour in colours]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 10


def test_colours_stand_out_from_the_paper() -> None:
    white = lab("white", SIGHT["everyone"])
    for colour in [*style.METHOD_COLOURS, *style.sequential(5), style.RANDOM_LOOK["color"]]:
        assert np.linalg.norm(lab(colour, SIGHT["everyone"]) - white) > 35


def test_a_users_settings_change_nothing() -> None:
    with mpl.rc_context({"font.size": 30}), style.house_style():
        assert mpl.rcParams["font.size"] == 8
    assert mpl.rcParams["font.size"] != 30
