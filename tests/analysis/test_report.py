"""The page: complete, self-contained, escaped, readable without scripts, and alive in a real browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from browser import browser
from planted import frame

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.recommending.judging import judge, unmeasured
from sensitivity.analysis.recommending.recommendation import Recommendation, warning
from sensitivity.analysis.reporting import sentences
from sensitivity.analysis.reporting.page import report
from sensitivity.analysis.reporting.static_figures import figures_of_task
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import mark_unfinished
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.exports import write_note
from sensitivity.study.study import Study

pytestmark = pytest.mark.usefixtures("few_trees")
HOSTILE = "</script><img src=x onerror=alert(1)>\"'`{{7*7}}"


def recommended(study: Study) -> Recommendation:
    candidates = solve(study, bpw=5.0)
    native = Plan.uniform(study.parts, None)
    shares = {candidates[0].plan.key: 0.9, native.key: 0.95}
    frames = {key: frame(share).assign(task=study.tasks[0]) for key, share in shares.items()}
    return judge(study, candidates, None, frames)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return planted.study(tmp_path_factory.mktemp("study"), {"vqa": planted.product}, noise=0.01)


@pytest.fixture(scope="module")
def page(study: Study) -> Path:
    return report(study, study.path / "report", recommended(study), bootstraps=3)


def test_it_says_what_to_do_how_sure_and_what_would_change_it(page: Path, study: Study) -> None:
    text = page.read_text()
    for heading in ("What to do", "How sure", "What would change the answer", "Kept at native precision"):
        assert heading in text
    assert f"Use the plan {recommended(study).plan.describe()}" in text
    assert "It was run on fresh examples and scored 0.9" in text
    assert "What each budget buys" in text
    assert "Recommended plans stand where fresh examples put them" in text
    assert 'class="bar of-star"' in text


def test_it_reads_in_order_and_has_a_list_of_contents(page: Path) -> None:
    text = page.read_text()
    order = ["decision", "sure", "frontier", "breaks", "parts", "budgets", "measured"]
    assert re.findall(r'<section id="(\w+)">', text) == order
    assert re.findall(r'<a href="#(\w+)">', text.partition("<nav")[2].partition("</nav>")[0]) == order
    assert "What a plan breaks" in text or "The answers of these plans are not known" in text


def test_every_figure_comes_as_picture_drawing_and_numbers(page: Path) -> None:
    names = {file.stem for file in page.parent.glob("*.png")}
    assert {"vqa-pareto", "vqa-importance", "vqa-by-bits", "vqa-interactions", "vqa-calibration", "vqa-levels"} <= names
    for name in names:
        for ending in ("svg", "csv"):
            assert (page.parent / f"{name}.{ending}").stat().st_size > 50
    assert not list(page.parent.glob(".*"))  # nothing half-written


def test_nothing_is_fetched(page: Path) -> None:
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.read_text())
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
    assert "default-src 'none'" in text


class Alternatives(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.named: list[bool] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "svg" and found.get("role") == "img":
            self.named.append(bool(found.get("aria-label")))
        if tag in ("clipPath", "clippath") and found.get("id"):
            self.ids.append(str(found["id"]))


def test_figures_have_alternatives_and_ids_of_their_own(page: Path) -> None:
    parser = Alternatives()
    parser.feed(page.read_text())
    assert len(parser.named) > 5
    assert all(parser.named)
    assert len(parser.ids) == len(set(parser.ids))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    parts = ComponentMap(
        HOSTILE, "linear",
        tuple(Weight(f"{p}.{HOSTILE}.weight", 1, 100, p, None, 0, None) for p in planted.PARTS),
        (Kept("x", 10, HOSTILE),),
    )  # fmt: skip
    study = Study.create(tmp_path / "run", parts, [HOSTILE], {"model": HOSTILE, "note": HOSTILE})
    bits = planted.grid((2, 4, 8))
    plans = [planted.plan(parts.names, row) for row in bits]
    study.append(plans, [{HOSTILE: float(value)} for value in planted.product(bits)])
    gained = {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 9}
    about = {"format": HOSTILE, "plan": HOSTILE, "bpw": 4.0, "bytes": 9, "written": True}
    write_note(study.path, Path(HOSTILE), {**about, "path_gain": {"path": HOSTILE, HOSTILE: gained}})
    text = report(study, tmp_path / "report", unmeasured(study, solve(study, bpw=5)), bootstraps=2).read_text()
    assert "<h3>Exported</h3>" in text
    assert "<img src=x" not in text
    assert "49" not in re.sub(r"[\d.]{3,}", "", text).split("<title>")[1].split("</title>")[0]
    data = re.search(r'<script type="application/json" id="plans">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["names"] == list(parts.names)
    with browser() as window:
        window.open(tmp_path / "report" / "index.html")
        assert window.run("return document.images.length") == 0
        assert window.run("return document.title").startswith(HOSTILE)


@pytest.mark.usefixtures("undrawn")
def test_several_budgets_several_methods_and_a_cliff(tmp_path: Path) -> None:
    def cliff(bits: np.ndarray) -> np.ndarray:
        return np.asarray(1.0 * (bits[:, 0] > 2) - 0.05 * planted.damage(bits[:, 2], 3))

    levels = (2, 4, 8)
    study = planted.study(tmp_path / "two", {"vqa": cliff}, 0.005, levels=levels)
    bits = planted.grid(levels)
    plans = [Plan(tuple((n, Scheme("rtn", int(b))) for n, b in zip(planted.PARTS, row, strict=True))) for row in bits]
    study.append(plans, [{"vqa": float(value)} for value in cliff(bits)])
    chosen = [unmeasured(study, solve(study, bpw=bpw)) for bpw in (5, 8)]
    text = report(study, tmp_path / "out", chosen, bootstraps=1).read_text()
    assert "The recommended plan for 5 bits per weight" in text
    assert "The recommended plan for 8 bits per weight" in text
    assert text.count('class="star"') == 2
    assert "Importance by method" in text
    assert "codes (27 trials)" in text
    assert "For vqa, keep vision above 2 bits: from there down the score collapses" in text
    assert "Bars are 95 % intervals" not in text  # only means are known
    assert text.count("Predicted only: nothing was run to check it.") == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("share", "near"), [(0.38, r"not shown to be better than chance \(0\.350\)"), (0.03, "next to nothing"), (0.9, "")]
)
def test_a_plan_that_lost_all_is_not_to_be_used(share: float, near: str, study: Study, tmp_path: Path) -> None:
    candidates, native = solve(study, bpw=5.0), Plan.uniform(study.parts, None)
    frames = {key: frame(mean) for key, mean in ((candidates[0].plan.key, share), (native.key, 0.95))}
    verified = {} if share < 0.1 else {"verified": {"chance": {"vqa": 0.35}}}
    chosen = judge(study, candidates, None, frames, provenance=verified)  # type: ignore[arg-type]
    text = report(study, tmp_path / "out", chosen, bootstraps=1).read_text()
    assert ("Use the plan" in text) == (not near)
    assert ("No plan within a budget of 5.00 is of use for vqa: the best, " in text) == bool(near)
    assert ("The best plan (of no use)" in text) == bool(near)
    if near:
        told = re.search(rf"scores ([0-9.]+) on vqa, {near}, where full precision scores ([0-9.]+)\.", text)
        assert told is not None
        assert float(told[1]) < 0.5 < float(told[2])


def test_a_wide_prediction_is_no_warning(study: Study) -> None:
    """Nobody has looked: that a plan is of no use is said where its score is at chance, or was measured near it."""
    (first, *_), chance = solve(study, bpw=5.0), {"study": {"chance": {"vqa": 0.35}}}
    for score, says in (
        (0.8, ""),
        (0.3, " Do not use it: it is predicted to score 0.300 on vqa, no better than chance"),
    ):
        predicted = {"vqa": replace(first.predicted["vqa"], score=score, low=0.2)}
        told = warning(unmeasured(study, [replace(first, predicted=predicted)], None, chance))
        assert told.startswith(says) if says else not told


def means(**curves: dict[int, float]) -> pd.DataFrame:
    return pd.DataFrame([(part, bits, mean) for part, curve in curves.items() for bits, mean in curve.items()],
                        columns=["part", "bits", "mean"])  # fmt: skip


def test_the_curves_are_held_against_full_precision() -> None:
    """And not against their own last width; where a curve falls below and rises again, its widths are named."""
    drawn = means(
        a={2: 0.4, 4: 0.92, 8: 0.95}, b={2: 0.53, 3: 0.53, 8: 0.58}, c={3: 0.95, 4: 0.5, 8: 0.96},
        d={2: 0.3, 4: 0.95, 8: 0.5}, e={2: 0.95, 3: 0.5, 4: 0.95, 6: 0.5, 8: 0.95},
    )  # fmt: skip
    told = sentences.by_bits_alt(drawn, "vqa", 0.975, alone=True)
    assert "90 % of full precision's 0.975: a down to 4 bits; b at no width (0.58 at best); c only at 3 and 8" in told
    assert "d only at 4 bits; e only at 2, 4 and 8 bits" in told
    assert "90 %" not in sentences.by_bits_alt(drawn, "vqa", None, alone=True)
    assert "90 %" not in sentences.by_bits_alt(drawn, "vqa", 0.0, alone=True)


@pytest.mark.usefixtures("undrawn")
def test_bad_widths_of_other_parts_are_not_held_against_a_part(tmp_path: Path) -> None:
    """Of averages over the others, the best plan with each width counts; and few plans say nothing."""

    def weak_language(bits: np.ndarray) -> np.ndarray:
        return np.asarray(0.9 - 0.8 * (bits[:, 2] <= 4))

    def told(study: Study) -> str:
        return next(one.alt for one in figures_of_task(study.table(), observations_of(study), None, 0.9)
                    if one.name == "by-bits")  # fmt: skip

    made = planted.study(tmp_path / "grid", {"vqa": weak_language}, levels=(3, 4, 8))
    kept = "connector down to 3 bits; language down to 8 bits; vision down to 3 bits."
    assert told(made).endswith(f"Widths at which the best plan keeps 90 % of full precision's 0.9: {kept}")
    few = planted.study(tmp_path / "few", {"vqa": weak_language}, rows=planted.grid((3, 4, 8))[:20:4])
    assert "90 %" not in told(few)


@pytest.mark.usefixtures("undrawn")
def test_parts_quantized_one_at_a_time_are_not_averaged_over_plans_that_quantize_all(tmp_path: Path) -> None:
    def weak_vision(bits: np.ndarray) -> np.ndarray:
        return np.asarray(0.9 - 0.8 * (bits[:, 0] <= 3))

    alone = [row for row in planted.grid((3, 4, 8, 16)) if (row != 16).sum() <= 1]
    rows = np.array([*alone, *([bits] * 3 for bits in (3, 4, 8))])
    made = planted.study(tmp_path, {"vqa": weak_vision}, rows=rows)
    told = {one.name: one.alt for one in figures_of_task(made.table(), observations_of(made), None, 0.9)}
    assert "by-bits" not in told
    kept = "vision down to 4 bits; connector down to 3 bits; language down to 3 bits."
    assert told["alone"].endswith(f"keep 90 % of full precision's 0.9: {kept}")
    of_all = planted.study(tmp_path / "all", {"vqa": weak_vision}, levels=(3, 4))  # as a grid quantizes every part
    assert "by-bits" in {one.name for one in figures_of_task(of_all.table(), observations_of(of_all), None, 0.9)}
    whole = planted.study(tmp_path / "grid", {"vqa": weak_vision}, levels=(3, 4, 16))
    drawn = figures_of_task(whole.table(), observations_of(whole), None, 0.9)
    assert {"by-bits", "alone"} <= {one.name for one in drawn}


@pytest.mark.usefixtures("undrawn")
def test_no_advice_comes_from_a_ranking_that_explains_nothing(study: Study, tmp_path: Path) -> None:
    found = rank(study, bootstraps=2)
    unsure = {"weak": replace(found, r2=0.07), "wide": replace(found, table=found.table.assign(**{"consensus.low": 0}))}
    for name, why in (("weak", "explains only 7 % of the variance"), ("wide", "cannot be told from nothing")):
        text = report(study, tmp_path / name, rankings={"vqa": unsure[name]}).read_text()
        assert "For vqa, it cannot be said yet on which part to spend bits" in text
        assert why in text
        assert "spend bits on" not in text.replace("on which part to spend bits", "")
    text = report(study, tmp_path / "sure", rankings={"vqa": found}).read_text()
    assert re.search(r"\(shares of the differences in score: \w+ \d+ % \[\d+, \d+\],", text)


@pytest.mark.usefixtures("undrawn")
def test_advice_names_the_fewest_bits_of_plans_that_are_of_use(tmp_path: Path) -> None:
    def lost(bits: np.ndarray) -> np.ndarray:
        return np.asarray(1 - 0.3 * (bits[:, 0] < 4) - 0.3 * (bits[:, 2] < 8))

    study = planted.study(tmp_path / "study", {"vqa": lost}, levels=(2, 4, 8, 16))
    text = report(study, tmp_path / "report", bootstraps=1).read_text()
    vision, _, language = planted.PARTS
    listed = f"{language} at 8 bits or more; {vision} at 4 bits or more"
    assert f"The measured plans that keep 90 % of full precision (23 of 63) have {listed}." in text

    def little(bits: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(bits.min(axis=1) == 16, 1.0, 0.5 + 0.1 * (bits[:, 0] > 2)))

    none = planted.study(tmp_path / "none", {"vqa": little}, levels=(2, 4, 16))
    text = report(none, tmp_path / "lost", bootstraps=1).read_text()
    assert "No measured plan keeps 90 % of full precision." in text


@pytest.mark.usefixtures("undrawn")
def test_what_a_budget_buys_stands_beside_what_was_measured(tmp_path: Path) -> None:
    study = planted.study(tmp_path / "study", {"vqa": planted.product}, noise=0.02)
    text = report(study, tmp_path / "report", bootstraps=1).read_text()
    rows = re.findall(r"<tr>(<td>\d+\.\d</td>.*?)</tr>", text.split("What each budget buys</h2>")[1])
    assert len(rows) > 3
    for row in rows:
        cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row)]
        score = next(trial for trial in study.measured() if trial.plan.describe() == cells[6]).scores["vqa"]["mean"]
        assert float(cells[3]) == pytest.approx(score, abs=6e-4)


def test_captions_name_what_the_cells_show(study: Study) -> None:
    """The largest cell beside the strongest pair over all plans, and whose share a cell of left-out widths is."""
    found = rank(study, bootstraps=2)
    pairs = pd.DataFrame(
        [("a", "b", 0.0033, -0.00068), ("a", "c", 0.002, -0.021), ("b", "c", 0.001, np.nan)],
        columns=["a", "b", "strength", "both_low"],
    )
    told = sentences.interactions_alt(replace(found, pairs=pairs))
    assert "hurt each other. Largest there: a with c (-0.021). Largest over all plans (0.0033 on average" in told
    assert told.endswith("which no cell shows: a with b.")
    same = sentences.interactions_alt(replace(found, pairs=pairs.iloc[1:]))
    assert same.endswith(
        "Largest there: a with c (-0.021), and also over all plans (0.002 on average, with either sign)."
    )
    none = sentences.interactions_alt(replace(found, pairs=pairs.iloc[2:]))
    assert none.endswith(
        "No plan has both so low. Largest over all plans (0.001 on average, with either sign): b with c."
    )
    told = sentences.levels_alt(found)
    assert told.startswith("A row is the part whose trials with one width, the column, are left out. A cell says")
    assert "the share of forest importance that it moves most, which may be another part's; largest: " in told


def test_estimators_are_called_what_the_tables_call_them(study: Study) -> None:
    found = rank(study, bootstraps=2)
    tau = found.tau.copy()
    tau.loc["shap", "fanova"] = tau.loc["fanova", "shap"] = -0.5
    assert "differ most between SHAP and fANOVA" in sentences.agreement(replace(found, tau=tau))


def test_a_tie_is_no_order(study: Study) -> None:
    found = rank(study, bootstraps=2)
    same = replace(found, tau=found.tau * 0 + 1.0)
    assert sentences.agreement(same) == "All estimators put the parts in the same order."
    table, tau = found.table.assign(ped_anova=50.0), same.tau.copy()
    tau.loc["ped_anova"] = tau["ped_anova"] = float("nan")  # equal shares have no order to correlate
    said = "All estimators put the parts in the same order, except that PED-ANOVA gives some the same share."
    assert sentences.agreement(replace(found, table=table, tau=tau)) == said


@pytest.mark.usefixtures("undrawn")
def test_few_trials_and_no_recommendation(tmp_path: Path) -> None:
    rows = planted.grid((4, 16))[:3]
    study = planted.study(tmp_path / "few", {"a": planted.product}, rows=rows)
    text = report(study, tmp_path / "out").read_text()
    assert "a ranking needs at least 8" in text
    assert "sensitivity recommend" in text
    empty = Study.create(tmp_path / "none", planted.parts(), ["a"], {})
    with pytest.raises(UserError, match=r"no trial of .* is finished yet"):
        report(empty, tmp_path / "out")


@pytest.mark.parametrize("levels", [(3, 8), (8, 16)])
@pytest.mark.usefixtures("undrawn")
def test_a_study_that_tells_nothing_says_so(levels: tuple[int, int], tmp_path: Path) -> None:
    rows = None if levels == (3, 8) else np.array([[16.0] * 3, [8.0] * 3])
    made = planted.study(tmp_path, {"vqa": lambda bits: np.zeros(len(bits))}, levels=levels, rows=rows)
    text = report(made, tmp_path / "report", bootstraps=2).read_text()
    assert "No plan can be chosen: full precision scores nothing on vqa." in text or not made.table()["native"].any()
    assert "table of budgets" not in text
    assert "Not at all yet: no part could be ranked" in text
    assert "keeps 90 %" not in text
    assert (tmp_path / "report" / "vqa-by-bits.png").exists() == (rows is None)  # one width is no curve
    ticks = [float(tick) for tick in re.findall(r'text-anchor="end">([^<]+)</text>', text)]
    assert min(ticks) < -0.01 < 0.01 < max(ticks)  # an axis, though all plans lie on one line


@pytest.mark.usefixtures("undrawn")
def test_noise_is_reported_as_such(tmp_path: Path) -> None:
    study = planted.study(tmp_path / "noise", {"a": lambda bits: 0 * bits[:, 0]}, noise=1.0, levels=(2, 4, 8))
    assert "worse than the mean" in report(study, tmp_path / "out").read_text()


def test_in_a_browser(page: Path) -> None:
    """The hover shows the plan, a click copies it, keys walk along the frontier; light, dark, phone."""
    where = """
        const plot = document.querySelector('.plot'), svg = plot.querySelector('svg');
        svg.scrollIntoView({block: 'center'});
        const points = JSON.parse(plot.parentNode.querySelector('.points').textContent);
        const p = points.filter(p => p.kind === 'uniform')[1], box = svg.getBoundingClientRect();
        const scale = box.width / svg.viewBox.baseVal.width;
        return [box.left + p.x * scale, box.top + p.y * scale, p.score];
    """
    tip = "const t = document.querySelector('.tip'); return [getComputedStyle(t).visibility, t.textContent]"
    with browser() as window:
        window.resize(1100, 900)
        window.open(page)
        assert window.run(tip)[0] == "hidden"
        x, y, score = window.run(where)
        window.point(x, y)
        visibility, text = window.run(tip)
        assert visibility == "visible"
        assert f"{score}" in text
        assert "all" in text
        assert "bits" in text
        window.run("window.copied = []; navigator.clipboard.writeText = async text => { window.copied.push(text); }")
        window.point(x, y, click=True)
        assert "plan copied" in window.run(tip)[1]
        plan = Plan.from_json(json.loads(window.run("return window.copied[0]")))
        assert plan.is_uniform
        assert set(dict(plan.schemes)) == set(planted.PARTS)
        window.point(1, 1)
        assert window.run(tip)[0] == "hidden"
        window.run("document.querySelector('.plot svg').focus()")
        window.key("\ue014")  # arrow right
        assert window.run(tip)[0] == "visible"
        errors = [entry for entry in window.send("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]
        assert not errors
        assert window.run("return performance.getEntriesByType('resource').length") == 0

        color = "return getComputedStyle(document.body).backgroundColor"
        seen = set()
        for scheme in ("light", "dark"):
            feature = [{"name": "prefers-color-scheme", "value": scheme}]
            window.devtools("Emulation.setEmulatedMedia", features=feature)
            seen.add(window.run(color))
        assert len(seen) == 2
        window.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        wide = window.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1]  # nothing sticks out on a phone
        assert window.picture().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_was_cut_off_is_written_again(study: Study, tmp_path: Path) -> None:
    """What a kill or a full disk left without its page is known by a mark; a folder without one is somebody else's."""
    out = tmp_path / "report"
    out.mkdir()
    mark_unfinished(out)
    (out / "a-pair.png").write_bytes(b"cut off")
    assert report(study, out, bootstraps=2).is_file()
    assert not list(out.glob(".*"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "a-pair.png").write_bytes(b"a picture of mine")
    with pytest.raises(UserError, match="it holds other things than an earlier report"):
        report(study, other, bootstraps=2)
    assert [file.name for file in other.iterdir()] == ["a-pair.png"]


def test_figures_let_the_shadows_of_a_scroll_show_through(page: Path) -> None:
    """Where a figure is wider than the window, a shadow at its edge says so; a ground of its own would hide it."""
    figures = re.findall(r'<div class="scroll"[^>]*><svg.*?</svg>', page.read_text(), re.S)
    assert figures
    assert not any("fill: var(--paper)" in one or "fill: #fefefe" in one for one in figures)
    assert "fill: #fefefe" in (page.parent / "vqa-pareto.svg").read_text()  # alone, it has a ground
