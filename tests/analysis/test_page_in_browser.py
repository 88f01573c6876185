"""Every page as people meet it: on a phone, a tablet, a desk and paper, light and dark; judged by a kept tool too."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser
from every_page import TEMPLATES, pages

from sensitivity.analysis.reporting import environment

pytestmark = pytest.mark.usefixtures("few_trees")
ROOT = Path(__file__).parents[2]
WIDTHS = (390, 768, 1280)
PAPER = 717  # CSS pixels of the lines on A4, with the margins of the browser
NAMES = list(TEMPLATES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def window() -> Iterator[Page]:
    with browser() as opened:
        yield opened


def at(window: Page, width: int) -> None:
    window.devtools(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 700
    )


def seen_as(window: Page, media: str, scheme: str = "light") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.devtools("Emulation.setEmulatedMedia", media=media, features=features)


def test_every_template_is_among_the_pages() -> None:
    templates = Path(environment.__file__).parent / "templates"
    whole = {file.name for file in templates.glob("*.html") if '{% extends "frame.html" %}' in file.read_text()}
    assert whole == set(TEMPLATES.values())


# the boxes of everything that is seen and does not scroll in a box of its own, and of the text that has no room
OUTSIDE = """const inner = innerWidth, wrong = [];
for (const one of document.querySelectorAll('main *, header *, footer *')) {
    if (one.closest('.scroll, pre, svg, .skip') || !one.offsetParent) continue;
    const box = one.getBoundingClientRect();
    if (box.left < -0.5 || box.right > inner + 0.5) wrong.push([one.outerHTML.slice(0, 90), box.left, box.right]);
}
return wrong"""
TABLES = """return [...document.querySelectorAll('table')].map(table => {
    const box = table.closest('.scroll'), place = box.getBoundingClientRect();
    box.scrollLeft = 1e6;
    return [place.left, place.right, box.scrollLeft, table.scrollWidth - box.clientWidth, box.tabIndex];
})"""


@pytest.mark.parametrize("name", NAMES)
def test_nothing_sticks_out_and_tables_scroll_inside_their_box(name: str, made: dict[str, Path], window: Page) -> None:
    window.open(made[name])
    seen_as(window, "screen")
    scrolled = 0
    for width in WIDTHS:
        at(window, width)
        wide, inner = window.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert window.run(OUTSIDE) == []
        assert wide <= inner == width
        for left, right, moved, over, tab in window.run(TABLES):
            assert -0.5 <= left <= right <= width + 0.5
            assert moved >= over - 1, "the last column can be reached"
            assert tab == 0
            scrolled += moved > 0
    assert scrolled > 0


def test_the_report_is_legible_on_a_phone_and_uses_the_room_of_a_desk(made: dict[str, Path], window: Page) -> None:
    height = "return [...document.querySelectorAll(arguments[0])].map(one => one.getBoundingClientRect().height)"
    overlap = """const boxes = [...document.querySelectorAll('.plot')].map(plot =>
        [...plot.querySelectorAll('text[text-anchor=middle]')].map(one => one.getBoundingClientRect()));
    return boxes.map(ticks => ticks.pop().top - Math.max(...ticks.map(box => box.bottom)))"""
    window.open(made["report"])
    seen_as(window, "screen")
    at(window, 390)
    assert min(window.run(height, "figure .scroll svg text")) > 9
    assert max(window.run(height, "#budgets tbody tr")) < 100
    assert min(window.run(overlap)) > 4, "the ticks do not touch the label of their axis"
    at(window, 1280)
    hidden = "return [...document.querySelectorAll('#frontier .scroll')].map(box => box.scrollWidth - box.clientWidth)"
    assert max(window.run(hidden)) <= 1, "no column is behind a scroll"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_is_all_there_and_has_no_controls(name: str, made: dict[str, Path], window: Page) -> None:
    window.open(made[name])
    at(window, PAPER)
    seen_as(window, "print", "dark")
    shown = "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e).display)"
    assert set(window.run(shown, "nav, .filter")) <= {"none"}
    assert "none" not in window.run(shown, ".change, section, table")
    right = "return Math.max(0, ...[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right))"
    assert 0 < window.run(right) <= PAPER, "paper cannot be scrolled"
    assert window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(window.devtools("Page.printToPDF")["data"]) > 10_000


def axe() -> str:
    """The source of axe-core, or a skipped test that says how to get it."""
    places = [os.environ.get("AXE_CORE", ""), str(ROOT / "node_modules" / "axe-core")]
    if npm := shutil.which("npm"):
        done = subprocess.run([npm, "root", "-g"], capture_output=True, text=True)
        places.append(f"{done.stdout.strip()}/axe-core")
    for place in filter(None, places):
        if (file := Path(place) / "axe.min.js").is_file():
            return file.read_text(encoding="utf-8")
    pytest.skip("no axe-core here (npm install --no-save axe-core, or AXE_CORE=its folder)")


def broken(window: Page) -> list[Any]:
    """The rules of WCAG 2.2, levels A and AA, and of good practice, that the page breaks, and where."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    run = "return axe.run(document, {runOnly: {type: 'tag', values: arguments[0]}})"
    found = window.run(run, tags)
    looked_at = {rule["id"] for kind in ("passes", "violations") for rule in found[kind]}
    assert {
        "color-contrast",
        *(["target-size"] if window.run("return !!document.querySelector('a')") else []),
    } <= looked_at
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"]][:3]) for rule in found["violations"]]


@pytest.mark.parametrize("name", NAMES)
def test_contrast_tap_targets_and_names_by_axe(name: str, made: dict[str, Path], window: Page) -> None:
    source = axe()
    window.open(made[name])
    window.run(source)
    # a gradient behind a table that scrolls, and its edge, leave the contrast of the text there undecided
    plain = "box.style.background = 'none'; box.style.overflow = 'visible'"
    window.run(f"document.querySelectorAll('.scroll').forEach(box => {{ {plain} }})")
    for width, scheme in ((390, "light"), (390, "dark"), (1280, "dark")):
        at(window, width)
        seen_as(window, "screen", scheme)
        assert broken(window) == []
    window.run("document.querySelector('main p').style.opacity = 0.3")
    assert [rule for rule, _ in broken(window)] == ["color-contrast"], "the tool would notice"
