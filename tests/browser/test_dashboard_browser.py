"""The page in a browser: clicks, keys, a narrow window, dark mode, contrast, lazy data."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Axe, Open, wait_until

FOCUSED = "document.activeElement.id"
MARKS = "performance.getEntriesByType('mark').map((mark) => mark.name)"
PAINTS = "performance.getEntriesByType('paint')"
VIEWS = ("#features", "#feature-3", "#feature-7", "#overview")


def rows(page: Any) -> list[str]:
    """The numbers of the features in the list, as far as they are drawn."""
    found: list[str] = page.locator("#rows tr[data-place] td:first-child").all_inner_texts()
    return found


def unpacked_blocks(page: Any) -> list[str]:
    marks: list[str] = page.evaluate(MARKS)
    return [mark.removeprefix("block ") for mark in marks if mark.startswith("block ")]


def wait_for_feature(page: Any, number: int) -> None:
    wait_until(page, f"document.getElementById('feature-name')?.textContent === 'Feature {number}'")


def test_a_click_on_a_row_shows_the_feature(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    page.locator("#row-12").click()
    wait_for_feature(page, 12)
    assert page.url.endswith("#feature-12")
    assert page.locator("#row-12").get_attribute("aria-selected") == "true"
    peaks = page.locator("#detail .token.peak").all_inner_texts()
    assert len(peaks) == 16
    assert set(peaks) == {" word12"}
    assert page.locator("#detail .effects tbody tr").count() == 12
    assert page.locator("#detail canvas").count() == 1
    page.go_back()
    wait_until(page, "location.hash === ''")


def test_a_context_opens_to_its_whole_window(open_page: Open, planted: Path) -> None:
    page = open_page(planted, "#feature-12")
    line = page.locator("details.context").first
    folded = line.bounding_box()["height"]
    assert line.locator(".token").count() == 64
    line.locator("summary").click()
    assert line.bounding_box()["height"] > 1.5 * folded
    page.keyboard.press("Enter")
    assert line.bounding_box()["height"] == folded


def test_near_features_are_links(open_page: Open, planted: Path) -> None:
    page = open_page(planted, "#feature-12")
    link = page.locator("#detail a").first
    number = int(re.findall(r"\d+", link.inner_text())[0])
    link.click()
    wait_for_feature(page, number)
    page.go_back()
    wait_for_feature(page, 12)


def test_columns_sort_both_ways(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    button = page.locator('th[data-key="feature"] button')
    header = page.locator('th[data-key="feature"]')
    button.click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert rows(page)[:3] == ["0", "1", "2"]
    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    assert rows(page)[:3] == ["23", "22", "21"]
    page.locator('th[data-key="drift"] button').click()
    # Features without an anchor have no drift and come last.
    assert set(rows(page)[:4]) == {"0", "1", "2", "3"}
    assert page.locator("#columns th[aria-sort='none']").count() == 7


def test_search_finds_numbers_and_tokens(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    page.locator("#search").fill("12")
    assert "12" in rows(page)
    for number in rows(page):
        text = page.locator(f"#row-{number}").inner_text()
        assert "12" in text
    page.locator("#search").fill("WORD15")
    assert "15" in rows(page)
    assert page.locator("#count").inner_text() == f"{len(rows(page))} of 24 features"
    page.locator("#search").fill("no such token")
    assert rows(page) == []
    page.locator("#search").fill("")
    for choice, count in {"anchored": 4, "free": 20, "silent": 1, "all": 24}.items():
        page.locator("#stratum").select_option(choice)
        assert len(rows(page)) == count


def test_everything_can_be_done_with_keys(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    page.keyboard.press("/")
    assert page.evaluate(FOCUSED) == "search"
    page.keyboard.type("word")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(FOCUSED) == "list"
    listed = rows(page)
    for place in (1, 2):
        page.keyboard.press("ArrowDown")
        current = page.locator("#list").get_attribute("aria-activedescendant")
        assert current == f"row-{listed[place]}"
        wait_for_feature(page, int(listed[place]))
    page.keyboard.press("End")
    wait_for_feature(page, int(listed[-1]))
    page.keyboard.press("Home")
    wait_for_feature(page, int(listed[0]))
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUSED) == "detail"
    page.keyboard.press("Escape")
    assert page.evaluate(FOCUSED) == "list"
    page.keyboard.press("/")
    assert page.locator("#search").input_value() == "word"


def test_what_has_the_focus_can_be_seen(open_page: Open, planted: Path) -> None:
    page = open_page(planted, "#feature-12")
    wait_for_feature(page, 12)
    seen = set()
    for _ in range(45):
        page.keyboard.press("Tab")
        outline = page.evaluate(
            """() => {
              const row = document.activeElement.id === "list"
                ? document.querySelector("#rows tr[aria-selected='true']") : document.activeElement;
              const style = getComputedStyle(row);
              return [row.tagName + row.className + row.id, style.outlineStyle, style.outlineWidth];
            }"""
        )
        if outline[0].startswith("BODY"):
            break
        seen.add(outline[0])
        assert outline[1] == "solid", outline
        assert outline[2] == "3px", outline
    assert len(seen) >= 6
    assert any(name.startswith("TR") for name in seen)


def test_hostile_tokens_are_text(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    for number, token in enumerate(pages.HOSTILE[:4]):
        page.evaluate(f"location.hash = '#feature-{number}'")
        wait_for_feature(page, number)
        assert set(page.locator("#detail .token.peak").all_inner_texts()) == {token}
    assert page.locator("img").count() == 0
    assert page.locator("script:not([type])").count() == 2


def test_what_cannot_be_seen_is_drawn(open_page: Open, planted: Path) -> None:
    page = open_page(planted, "#feature-7")
    chips = page.locator("#rows .chip").all_inner_texts()
    assert "↵" in chips
    assert "␣leading" in chips
    assert "\\x202eright to left" in chips
    wait_for_feature(page, pages.SILENT)
    assert page.get_by_text("Silent on all 3,840 held-out tokens.").count() == 1


def test_only_rows_in_view_exist_and_data_is_unpacked_when_needed(
    open_page: Open, large: Path
) -> None:
    page = open_page(large)
    assert page.locator("#list").get_attribute("aria-rowcount") == "8193"
    assert 10 < len(rows(page)) < 80
    first = unpacked_blocks(page)
    assert {"table", "strings"} <= set(first)
    assert len([name for name in first if name.startswith("features-")]) <= 1
    page.locator('th[data-key="feature"] button').click()
    page.locator("#list").focus()
    page.keyboard.press("End")
    wait_for_feature(page, 8191)
    assert 10 < len(rows(page)) < 80
    assert rows(page)[-1] == "8191"
    assert unpacked_blocks(page).count("features-127") == 1


def test_8192_features_are_there_after_little_work(open_page: Open, large: Path) -> None:
    page = open_page(large)
    # The data may be there before the first frame is.
    wait_until(page, f"{PAINTS}.length === 2")
    kinds = Counter(name.split("-")[0] for name in unpacked_blocks(page))
    assert kinds.keys() >= {"table", "strings"}
    assert kinds["features"] <= 1  # of 128; sequences are those of its contexts
    assert page.evaluate("document.getElementsByTagName('*').length") < 3000
    assert large.stat().st_size < 25e6


def test_memory_of_unpacked_data_is_bounded(open_page: Open, large: Path) -> None:
    page = open_page(large)
    for number in range(0, 8192, 128):
        page.evaluate(f"location.hash = '#feature-{number}'")
        wait_for_feature(page, number)
    kept = page.evaluate("unpackedBlocks.size")
    assert kept == page.evaluate("KEPT_BLOCKS")
    assert len(set(unpacked_blocks(page))) > kept


def test_scrolling_brings_rows_into_being(open_page: Open, large: Path) -> None:
    page = open_page(large)
    page.locator('th[data-key="feature"] button').click()
    page.evaluate("document.getElementById('scroller').scrollTop = 32 * 4000")
    wait_until(page, "document.getElementById('row-4005') !== null")
    assert page.locator("#row-0").count() == 0
    box, scroller = page.locator("#row-4005").bounding_box(), page.locator("#scroller")
    assert scroller.bounding_box()["y"] < box["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_in_the_colours_of_the_scheme(
    open_page: Open, planted: Path, scheme: str
) -> None:
    page = open_page(planted, "#overview", color_scheme=scheme)
    wait_until(page, "document.querySelectorAll('#overview canvas').length === 10")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 382) == (scheme == "light")
    colours = page.locator("#overview canvas").first.evaluate(COLOURS_OF_CHART)
    assert len(colours) > 20
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    others = colours
    for _ in range(100):
        if others != colours:
            break
        page.wait_for_timeout(50)
        others = page.locator("#overview canvas").first.evaluate(COLOURS_OF_CHART)
    assert len(others) > 20
    assert others != colours
    assert page.locator("#overview canvas").count() == 10


def test_the_overview_names_what_it_draws(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    assert page.locator("#overview canvas").count() == 0
    page.locator("#to-overview").click()
    wait_until(page, "document.querySelectorAll('#overview canvas').length === 10")
    described = page.locator("#overview [role=img]").evaluate_all(
        "charts => charts.map((chart) => chart.ariaLabel)"
    )
    assert all(described)
    assert any("Multipliers λ over training; at the end:" in text for text in described)
    page.get_by_text("As a table").click()
    table = page.locator("#overview details table tbody tr")
    assert table.count() == 3
    assert "this SAE" in page.locator("#overview .own").inner_text()
    page.locator("#to-features").click()
    wait_until(page, "!document.getElementById('features').hidden")
    assert not page.locator("#overview").is_visible()


def test_where_nothing_is_anchored_nothing_speaks_of_anchors(open_page: Open, plain: Path) -> None:
    page = open_page(plain, "#feature-12")
    wait_for_feature(page, 12)
    heads = page.locator("#columns th").all_inner_texts()
    assert [head.split()[0] for head in heads] == ["Feature", "Fires", "Promotes", "Density", "Max"]
    assert page.locator("#stratum option").all_inner_texts() == ["all", "silent"]
    page.locator("#to-overview").click()
    wait_until(page, "document.querySelectorAll('#overview canvas').length === 1")
    assert "anchor" not in page.locator("body").inner_text().lower()


def test_an_l0_axis_has_ticks_however_narrow_it_is(open_page: Open, planted: Path) -> None:
    page = open_page(planted)
    for low, high in ((13.3, 19.2), (0.9, 1.3), (240, 260), (3, 9), (1, 4000)):
        ticks = page.evaluate(f"logTicks({low}, {high})")
        assert 3 <= len(ticks) <= 15 and all(low <= tick <= high for tick in ticks)


def test_what_is_not_known_is_said(open_page: Open, plain: Path) -> None:
    page = open_page(plain, "#feature-12")
    wait_for_feature(page, 12)
    assert "Threshold" not in page.locator("#detail").inner_text()
    page.locator("#to-overview").click()
    wait_until(page, "document.querySelectorAll('#overview canvas').length === 1")
    said = page.locator("#overview").inner_text()
    assert "No frontier was given." in said
    assert "There is no metrics log of this SAE." in said
    assert "Thresholds θ" not in said


@pytest.mark.parametrize("address", ["#features", "#feature-12", "#overview"])
@pytest.mark.parametrize("width", [1440, 360])
def test_a_plain_page_fits_and_axe_finds_nothing(
    open_page: Open, axe: Axe, plain: Path, width: int, address: str
) -> None:
    page = open_page(plain, address, width=width, color_scheme="dark", bypass_csp=True)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not [rule["id"] for rule in axe(page)["violations"]]


@pytest.mark.parametrize("width", [1700, 1440, 920, 360])
@pytest.mark.parametrize("kind", ["planted", "plain"])
def test_no_column_is_too_narrow_for_its_name(
    open_page: Open, request: pytest.FixtureRequest, kind: str, width: int
) -> None:
    page = open_page(request.getfixturevalue(kind), width=width)
    for name in page.locator("#columns th:visible").evaluate_all(
        "e => e.map((c) => c.dataset.key)"
    ):
        page.locator(f'th[data-key="{name}"] button').click()  # adds an arrow
        assert page.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("address", VIEWS)
def test_a_narrow_window_shows_one_thing_at_a_time(
    open_page: Open, planted: Path, address: str
) -> None:
    page = open_page(planted, address, width=360)
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shown = [page.locator(place).is_visible() for place in (".list-pane", "#detail", "#overview")]
    assert sum(shown) == 1


def test_a_narrow_window_goes_to_a_feature_and_back(open_page: Open, planted: Path) -> None:
    page = open_page(planted, width=360)
    page.locator("#row-12").click()
    wait_for_feature(page, 12)
    assert not page.locator(".list-pane").is_visible()
    page.locator("#detail .back").click()
    assert page.locator(".list-pane").is_visible()
    assert page.evaluate(FOCUSED) == "list"
    page.keyboard.press("Enter")
    wait_until(page, f"{FOCUSED} === 'detail'")  # the feature shown was this one already
    assert not page.locator(".list-pane").is_visible()


@pytest.mark.parametrize("address", VIEWS)
@pytest.mark.parametrize("width", [1440, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    open_page: Open, axe: Axe, planted: Path, scheme: str, width: int, address: str
) -> None:
    """Contrast (WCAG AA), names, roles and the rest of what axe-core knows."""
    # axe is put in as a script, which the page's own policy rightly forbids.
    page = open_page(planted, address, width=width, color_scheme=scheme, bypass_csp=True)
    page.wait_for_timeout(300)
    found = axe(page)
    faults = [
        (rule["id"], node["html"][:120], node["failureSummary"][:200])
        for rule in found["violations"]
        for node in rule["nodes"]
    ]
    assert not faults
    assert any(rule["id"] == "color-contrast" for rule in found["passes"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_can_be_read_on_every_colour(open_page: Open, planted: Path, scheme: str) -> None:
    page = open_page(planted, "#feature-12", color_scheme=scheme)
    wait_for_feature(page, 12)
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) == 21
    assert min(ratios) >= 4.5
    # The strongest is told from the background, too.
    assert page.evaluate(STRONGEST_AGAINST_BACKGROUND) >= 1.5


CUT_OFF = """[...document.querySelectorAll("#columns th button")]
  .filter((button) => button.offsetParent && button.scrollWidth > button.clientWidth)
  .map((button) => button.textContent)"""
"""Names of columns that do not fit."""

COLOURS_OF_CHART = """(chart) => {
  const copy = new OffscreenCanvas(chart.width, chart.height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(chart, 0, 0);
  const { data } = context.getImageData(0, 0, chart.width, chart.height);
  return [...new Set(new Uint32Array(data.buffer))].sort();
}"""
"""Every colour that occurs in a chart."""

RELATIVE_LUMINANCE = """
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const token = document.querySelector(".token.active");
  const style = getComputedStyle(token);
"""
"""WCAG's contrast ratio, of computed colours as they are painted."""

CONTRASTS = f"""() => {{{RELATIVE_LUMINANCE}
  return Array.from({{ length: 21 }}, (_, i) => {{
    token.style.setProperty("--share", i / 20);
    return ratio(style.color, style.backgroundColor);
  }});
}}"""

STRONGEST_AGAINST_BACKGROUND = f"""() => {{{RELATIVE_LUMINANCE}
  token.style.setProperty("--share", 1);
  return ratio(style.backgroundColor, getComputedStyle(document.body).backgroundColor);
}}"""
