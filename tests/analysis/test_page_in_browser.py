"""The report as people meet it: on a phone, a tablet, a desk and paper, light and dark; judged by a kept tool too."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import answered
import numpy as np
import planted
import pytest
from answered import NATIVE
from browser import Page, browser

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.allocate.recommendation import judge
from sensitivity.analysis.report.page import report
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

ROOT = Path(__file__).parents[2]
WIDTHS = (390, 768, 1200)


def given(plan: Plan, example: Example) -> str:
    """The fewer bits, the more answers are wrong, as if by a planted law."""
    if plan.is_native:
        return example.answers[0]
    share = planted.product(np.array([list(plan.bits().values())], dtype=float))[0]
    return example.answers[0] if int(example.id.split("-")[2]) % 20 < 20 * share else "wrong"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: two tasks, counts, galleries with boxes, rankings, budgets."""
    plans = [NATIVE, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 8, 16))[:-1])]
    tasks = [task(name, n=40) for name in ("vqa", "ground")]
    made = answered.study(tmp_path_factory.mktemp("page") / "run", tasks, given, ["vqa", "ground"], n=40, plans=plans)
    candidates = solve(made, bpw=6.0, top=2)
    frames = {trial.key: rows for trial in made.trials() if (rows := made.examples(trial.plan)) is not None}
    rival = next(c for c in solve(made, bpw=6.0, top=9) if c.plan.is_uniform or c is not candidates[0])
    return report(made, made.path / "report", judge(made, candidates, rival, frames), bootstraps=2)


def at(window: Page, width: int) -> None:
    window.devtools(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 700
    )


def test_nothing_sticks_out_and_tables_scroll_inside_their_box(page: Path) -> None:
    boxes = """return [...document.querySelectorAll('table')].map(table => {
        const box = table.closest('.scroll'), place = box.getBoundingClientRect();
        box.scrollLeft = 1e6;
        return [place.left, place.right, box.scrollLeft, table.scrollWidth - box.clientWidth, box.tabIndex];
    })"""
    with browser() as window:
        window.open(page)
        scrolled = 0
        for width in WIDTHS:
            at(window, width)
            wide, inner = window.run("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= inner == width
            for left, right, moved, over, tab in window.run(boxes):
                assert -0.5 <= left <= right <= width + 0.5
                assert moved >= over - 1, "the last column can be reached"
                assert tab == 0
                scrolled += moved > 0
        assert scrolled > 0


def test_what_is_printed_is_all_there_and_has_no_controls(page: Path) -> None:
    with browser() as window:
        window.open(page)
        window.devtools("Emulation.setEmulatedMedia", media="print")
        shown = "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e).display)"
        assert set(window.run(shown, "nav, .filter")) == {"none"}
        assert "none" not in window.run(shown, ".change, section, table")
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
    """The rules of WCAG 2.2, levels A and AA, that the page breaks, and where."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    run = "return axe.run(document, {runOnly: {type: 'tag', values: arguments[0]}})"
    found = window.run(run, tags)
    assert {"color-contrast", "target-size"} <= {rule["id"] for rule in (*found["passes"], *found["violations"])}
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"]][:3]) for rule in found["violations"]]


def test_contrast_tap_targets_and_names_by_axe(page: Path) -> None:
    source = axe()
    with browser() as window:
        window.open(page)
        at(window, 390)
        window.run(source)
        for scheme in ("light", "dark"):
            window.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert broken(window) == []
        window.run("document.querySelector('main p').style.opacity = 0.3")
        assert [rule for rule, _ in broken(window)] == ["color-contrast"], "the tool would notice"
