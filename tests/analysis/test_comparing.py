"""Two studies or plans: paired exactly where the same question was asked about the same image."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import answered
import numpy as np
import planted
import pytest
from answered import FOUR, NATIVE, TWO
from browser import browser

from sensitivity.analysis.comparing.sides import both_sides, plan_of, side
from sensitivity.analysis.comparing.versus import MAX_ROWS, SAME, compare_sides
from sensitivity.analysis.failures.changes import changed_answers
from sensitivity.cli.main import main
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.study.trial import Trial
from sensitivity.tasks.examples.types import Example, Task, exact
from sensitivity.tasks.table import task


def worse(share: int):  # type: ignore[no-untyped-def]
    """Every so many-th answer of quantized plans is wrong; twice as many at two bits."""

    def given(plan: Plan, example: Example) -> str:
        number = int(example.id.split("-")[2])
        step = share if plan.key == FOUR.key else max(share // 2, 1)
        return "wrong" if not plan.is_native and number % step == 0 else example.answers[0]

    return given


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Study]:
    folder = tmp_path_factory.mktemp("pair")
    first = answered.study(folder / "a", [task("vqa", n=200)], worse(4), ["vqa"], n=200)
    return first, answered.study(folder / "b", [task("vqa", n=100)], worse(2), ["vqa"])


def test_studies_are_paired_on_the_examples_that_both_have_seen(pair: tuple[Study, Study]) -> None:
    found = compare_sides(side(str(pair[0].path)), side(str(pair[1].path)))
    assert found.notes == ("they differ in n: 200 in A, 100 in B",)
    assert {row.what for row in found.rows} >= {"full precision", "the same plan"}
    row = next(row for row in found.rows if row.what == "the same plan" and row.a.key == FOUR.key)
    ours, theirs = (study.examples(FOUR).set_index("example")["score"] for study in pair)  # type: ignore[union-attr]
    assert (len(ours), len(theirs)) == (200, 100)
    both = ours.index.intersection(theirs.index)
    assert row.paired.shared == len(both) == 100
    assert row.paired.difference.mean == pytest.approx((theirs[both] - ours[both]).mean())
    assert row.paired.to_wrong == (theirs[both] < ours[both]).sum() > 0 == row.paired.to_right
    assert row.paired.words.startswith("B scores clearly lower on vqa")
    assert (row.paired.a.mean, row.paired.b.mean) == pytest.approx((ours.mean(), theirs.mean()))
    a, b = row.paired.compared
    assert b.mean - a.mean == pytest.approx(row.paired.difference.mean), "the scores beside it are of the same examples"
    full = found.rows[0].paired
    # the same plan of the same model with the same answers has nothing to estimate
    assert (full.difference.mean, full.difference.low, full.difference.high) == (0, 0, 0)
    assert full.words.startswith("No difference is shown")


def test_the_same_plan_differs_from_itself_where_an_answer_or_the_model_is_another(tmp_path: Path) -> None:
    """Other words with the same score could be another score on examples that were not seen."""

    def reworded(plan: Plan, example: Example) -> str:
        return example.answers[0].upper()

    first, again = (
        answered.study(tmp_path / name, [task("vqa", n=30)], given, ["vqa"], n=30, plans=[NATIVE])
        for name, given in (("first", lambda plan, example: example.answers[0]), ("again", reworded))
    )
    rows = first.examples(NATIVE), again.examples(NATIVE)
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0]["score"].equals(rows[1]["score"])
    assert not rows[0]["answer"].equals(rows[1]["answer"])
    found = compare_sides(side(str(first.path)), side(str(again.path))).rows[0].paired.difference
    assert found.low < found.mean == 0 < found.high


def test_full_precision_is_the_same_plan_of_other_components_too(tmp_path: Path) -> None:
    finer = ("vision.front", "connector", "language")
    native = Plan.uniform(planted.parts(finer), None)
    first, again = (
        answered.study(tmp_path / names[0], [task("vqa", n=30)], worse(4), ["vqa"], n=30, plans=[plan], names=names)
        for names, plan in ((planted.PARTS, NATIVE), (finer, native))
    )
    found = compare_sides(side(str(first.path)), side(str(again.path))).rows[0].paired.difference
    assert NATIVE.key != native.key
    assert (found.low, found.mean, found.high) == (0, 0, 0)


def test_what_budgets_show_is_said(pair: tuple[Study, Study]) -> None:
    """Full precision alone says nothing of the plans that a comparison is about."""
    found = compare_sides(side(str(pair[0].path)), side(str(pair[1].path)))
    lines = [row for row in found.rows if "within" in row.what]
    assert any(row.paired.difference.high < 0 for row in lines)
    (line,) = (line for line in found.words if line.startswith("vqa, the best plan of each within a budget: "))
    for row in lines:
        budget, difference = row.what.removeprefix("best within "), row.paired.difference
        assert f"{budget} ({difference.signed})" in line if difference.high < 0 else budget in line
    assert "B scores clearly lower within " in line


def test_a_plan_or_study_against_itself_does_not_differ_and_is_said(pair: tuple[Study, Study]) -> None:
    study, plan = str(pair[0].path), f"{pair[0].path}:{FOUR.key[:8]}"
    for a, b, what in ((study, study, "study"), (study, plan, "plan of the same study"), (plan, plan, "plan of the")):
        found = compare_sides(side(a), side(b))
        assert found.notes[0].startswith(f"A and B are the same {what}")
        assert {(row.paired.difference.low, row.paired.difference.high) for row in found.rows} == {(0, 0)}
    assert found.words == ["The plans: No difference is shown on vqa: +0.000 [+0.000, +0.000], 200 paired examples."]
    assert compare_sides(side(study), side(study)).words[-1] == "vqa: 2 plans measured by both, with equal scores."
    two = f"{pair[0].path}:{TWO.key[:8]}"
    assert compare_sides(side(plan), side(two)).notes == ()


def test_another_method_is_said(pair: tuple[Study, Study], tmp_path: Path) -> None:
    """Columns of plans name widths alone where a plan has one method."""
    plans = [Plan.uniform(pair[0].parts, Scheme(method, 4, "row", True)) for method in ("gptq", "rtn")]
    other = answered.study(tmp_path / "other", [task("vqa", n=100)], worse(2), ["vqa"], plans=(NATIVE, plans[0]), n=200)
    sides = side(str(pair[0].path)), side(str(other.path))
    assert "they differ in method: codes in A, gptq in B" in compare_sides(*sides).notes
    assert not [note for note in compare_sides(sides[0], side(str(pair[1].path))).notes if "method" in note]
    keyed = side(f"{other.path}:{plans[0].key}")
    assert "they differ in method: codes in A, gptq in B" in compare_sides(replace(sides[0], plan=FOUR), keyed).notes
    native = compare_sides(replace(sides[0], plan=NATIVE), replace(sides[1], plan=NATIVE))
    assert not [note for note in native.notes if "method" in note]


def test_plans_are_paired_on_fresh_examples_if_one_ran_only_there(tmp_path: Path) -> None:
    made = answered.study(tmp_path / "run", [task("vqa", n=20)], worse(4), ["vqa"], n=20, plans=[NATIVE, TWO])
    fresh = paths.verification_folder(made.path)
    answered.study(fresh, [task("vqa", n=20, seed=1)], worse(4), ["vqa"], n=20, seed=1, plans=[NATIVE, FOUR])
    native, four, two = (f"{made.path}:{plan.key[:8]}" for plan in (NATIVE, FOUR, TWO))
    for a, b in ((native, four), (four, native)):
        assert [one.study.path for one in both_sides(a, b)] == [fresh, fresh]
        (row,) = compare_sides(*both_sides(a, b)).rows
        assert row.paired.shared == 20
    assert [one.study.path for one in both_sides(native, two)] == [made.path, made.path]
    assert [one.study.path for one in both_sides(str(made.path), four)] == [fresh, fresh]
    unpaired = compare_sides(*both_sides(two, four)).rows[0].paired
    assert (unpaired.shared, unpaired.compared) == (0, (unpaired.a, unpaired.b))
    assert unpaired.difference.low < unpaired.difference.mean < unpaired.difference.high


def test_the_page_of_two_plans_shows_gains_as_well_as_losses(tmp_path: Path) -> None:
    """Of 100 answers that differ, two are losses; answers that differ with equal scores come last."""

    def given(plan: Plan, example: Example) -> str:
        number = int(example.id.split("-")[1])
        right = number in (5, 9) if plan.key == TWO.key else number not in (5, 9)
        return example.answers[0] if right or plan.is_native else f"wrong {plan.key[:2] if number < 3 else ''}"

    image = np.zeros((4, 4, 3), np.uint8)
    own = Task(
        "own", tuple(Example(f"x-{i}", f"x-{i}", "all", image, f"is {i} it?", ("yes",)) for i in range(40)), exact
    )
    made = answered.study(tmp_path / "run", [own], given)
    out = tmp_path / "page.html"
    assert main(["compare", *(f"{made.path}:{plan.key}" for plan in (TWO, FOUR)), "--out", str(out)]) == 0
    before, after = made.examples(TWO), made.examples(FOUR)
    assert before is not None
    assert after is not None
    directions = out.read_text(encoding="utf-8").split("Score of B <select")[1].split("</select>")[0]
    assert directions.count("<option>") == 2  # lower and higher
    costs = [one.cost for one in changed_answers(after, before, {}, both_ways=True)]
    assert costs == [1, -1, 1, *[-1] * 37]
    assert "40 answers changed, those whose scores differ most first, losses and gains in turn" in out.read_text()


def test_how_many_examples_each_mean_and_the_difference_are_of_is_shown(
    pair: tuple[Study, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(pair[0].path), str(pair[1].path)]) == 0
    assert "200/100/100" in capsys.readouterr().out


def test_sizes_that_are_counted_differently_are_said(pair: tuple[Study, Study], tmp_path: Path) -> None:
    counted = answered.study(tmp_path / "counted", [task("vqa", n=100)], worse(2), ["vqa"], runtime="openvino")
    (note,) = compare_sides(side(str(pair[1].path)), side(str(counted.path))).notes
    assert note == (
        "size is counted of the plan alone in A, as openvino files store it in B, so the same bpw is not the same size"
    )


def test_budgets_compare_the_best_measured_plans_within_them(pair: tuple[Study, Study]) -> None:
    rows = [row for row in compare_sides(side(str(pair[0].path)), side(str(pair[1].path))).rows if "within" in row.what]
    assert rows
    for row in rows:
        budget = float(row.what.split()[2])
        for study, plan in zip(pair, (row.a, row.b), strict=True):
            fitting = [t for t in study.measured() if t.bpw <= budget and not t.plan.is_native]
            best = max(fitting, key=lambda t: t.scores["vqa"]["mean"])
            assert best.scores["vqa"]["mean"] == next(t.scores["vqa"]["mean"] for t in fitting if t.key == plan.key)


def test_other_questions_of_the_same_name_are_not_paired(tmp_path: Path) -> None:
    """Lines of two files are numbered alike, and are about other things."""

    def numbered(prompt: str) -> Task:
        image = np.zeros((4, 4, 3), np.uint8)
        names = [f"x-0-{i}" for i in range(30)]
        return Task("own", tuple(Example(n, n, "all", image, f"{prompt} {n}", ("yes",)) for n in names), exact)

    for name, prompt in (("a", "is it?"), ("b", "was it?"), ("c", "is it?")):
        answered.study(tmp_path / name, [numbered(prompt)], worse(3), seed=ord(name))
    a, b, c = (side(str(tmp_path / name)) for name in "abc")
    first = compare_sides(a, b).rows[1].paired
    assert first.shared == 0
    assert "unpaired: they have seen other examples" in first.words
    assert first.difference.se == pytest.approx(np.hypot(first.a.se, first.b.se))
    assert compare_sides(a, c).rows[1].paired.shared == 30


def test_two_plans_of_one_study(pair: tuple[Study, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = f"{pair[0].path}:{FOUR.key[:8]}", f"{pair[0].path}:{TWO.key[:8]}"
    out = tmp_path / "page.html"
    assert main(["compare", a, b, "--out", str(out), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["a_key"], row["b_key"], row["paired_examples"]) == (FOUR.key, TWO.key, 200)
    assert row["difference"]["mean"] < 0 < row["to_wrong"]
    assert main(["compare", a, b]) == 0
    assert "B scores clearly lower on vqa" in (printed := capsys.readouterr().out)
    assert "200/200/200" in printed
    assert "<th>n of A/B/both</th>" in (written := out.read_text(encoding="utf-8"))
    assert "<td>200/200/200</td>" in written
    assert "Score of B <select" not in written  # all are lower
    with browser() as window:
        window.open(out)
        cards = window.run("return document.querySelectorAll('.change').length")
        assert cards == min(row["to_wrong"] + row["to_right"], 60)
        assert window.run("return document.images.length") == cards
        assert [window.run(f"return document.querySelectorAll('.change dt')[{i}].textContent") for i in (1, 2)] == [
            "A",
            "B",
        ]


def test_the_page_of_several_tasks_has_a_filter(pair: tuple[Study, Study], tmp_path: Path) -> None:
    for name in ("a", "b"):
        answered.study(tmp_path / name, [task("vqa", n=20), task("scene", n=20)], worse(4), ["vqa", "scene"], n=20)
    page = tmp_path / "page.html"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(page)]) == 0
    with browser() as window:
        window.open(page)
        choose = """const choice = document.querySelector('select[data-gallery="rows"]');
            choice.value = arguments[0]; choice.dispatchEvent(new Event('change'));
            return [...document.querySelectorAll('#rows tr')].filter(one => !one.hidden).map(one => one.dataset.task)"""
        assert set(window.run(choose, "")) == {"vqa", "scene"}
        assert set(window.run(choose, "scene")) == {"scene"}
    assert main(["compare", str(pair[0].path), str(pair[1].path), "--out", str(page)]) == 0
    assert 'data-gallery="rows"' not in page.read_text(encoding="utf-8"), "one task"


def test_two_studies_as_a_page(pair: tuple[Study, Study], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", str(pair[0].path), str(pair[1].path), "--out", str(page)]) == 0
    with browser() as window:
        window.open(page)
        figure = window.run("return document.querySelector('figure svg').getAttribute('aria-label')")
        assert figure.startswith("Lines of the best vqa that each size reaches; within ")
        texts = window.run("return [...document.querySelectorAll('figure svg text')].map(t => t.textContent)")
        assert {"A", "B"} <= set(texts)
        window.devtools("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
        seen = "const a = document.querySelector('.scroll:has(table)'); return a.scrollWidth - a.clientWidth"
        assert window.run(seen) == 0, "both plans are in sight"
        window.devtools("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        height = "return [...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
        assert min(window.run(height)) > 9, "figures scroll on a phone, as in a report"
        assert window.run("return document.documentElement.scrollWidth") <= 390


def test_of_many_plans_that_both_measured_those_are_shown_that_differ_most(tmp_path: Path) -> None:
    plans = [NATIVE, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 3, 4))[:12])]

    def by_bits(flip: int):  # type: ignore[no-untyped-def]
        def given(plan: Plan, example: Example) -> str:
            worse = flip * sum(plan.bits().values()) if not plan.is_native else 0
            return "wrong" if int(example.id.split("-")[2]) % 50 < worse else example.answers[0]

        return given

    for name, flip in (("a", 1), ("b", 3)):
        answered.study(tmp_path / name, [task("vqa", n=60)], by_bits(flip), ["vqa"], n=60, plans=plans)
    found = compare_sides(*(side(str(tmp_path / name)) for name in "ab"))
    every = [row for row in found.rows if row.what == SAME]
    shown = [row for row in found.shown if row.what == SAME]
    assert (len(every), len(shown)) == (12, MAX_ROWS)
    least = min(abs(row.paired.difference.mean) for row in shown)
    assert all(abs(row.paired.difference.mean) <= least for row in every if row not in shown)
    clear = sum(row.paired.difference.high < 0 for row in every)
    assert clear > 0
    assert (
        f"12 plans measured by both, of which the 5 that differ most are shown; B scores clearly lower with {clear} of"
        in found.words[-1]
    )
    assert len(found.to_json()["rows"]) == len(found.rows)  # type: ignore[arg-type]
    named = side(f"{tmp_path / 'a'}:{plans[1].key}")
    assert compare_sides(named, named).notes == ("A and B are the same plan of the same study",)
    same = compare_sides(side(str(tmp_path / "a")), side(str(tmp_path / "a")))
    assert [row for row in same.shown if row.what == SAME] == [], "equal scores need no row"


def test_a_plan_is_named_by_its_number_or_how_its_key_begins(tmp_path: Path) -> None:
    plans = [NATIVE, *(planted.plan(planted.PARTS, [bits, 4, 4]) for bits in range(1, 9))]
    study = answered.study(tmp_path / "run", [task("vqa", n=4)], worse(4), ["vqa"], n=4, plans=plans)
    assert NATIVE.key.startswith("3")  # which is not what 3 names
    for number, plan in enumerate(plans):
        for wanted in (str(number), plan.key[:8], plan.key):
            assert side(f"{study.path}:{wanted}").plan == plan_of(study, wanted)[1] == plan
    with pytest.raises(UserError, match=r"several plans with the number or key 'd'; plans .*: 3 d.*, 8 d"):
        plan_of(study, "d")
    # trials of the verification have numbers of their own, which nobody means who names the study
    more = [*plans, *(planted.plan(planted.PARTS, [4, 4, bits]) for bits in range(1, 9))]
    answered.study(paths.verification_folder(study.path), [task("vqa", n=4)], worse(4), ["vqa"], n=4, plans=more)
    with pytest.raises(UserError, match="has no measured plan '16'"):
        plan_of(study, "16")
    assert plan_of(study, more[-1].key[:6])[1] == more[-1]


def test_a_number_of_four_digits_may_fit_two_plans_and_a_shorter_one_never_is_a_key() -> None:
    numbered, keyed = (replace(Trial.of(NATIVE), number=number, key=key) for number, key in ((3175, "a"), (1, "3175")))
    assert numbered.fits("3175")
    assert keyed.fits("3175")
    assert not keyed.fits("317")
    assert keyed.fits("1")


def test_what_cannot_be_compared_is_said(pair: tuple[Study, Study], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a study nor STUDY:KEY"):
        side("gone:abc")
    with pytest.raises(UserError, match="is neither a study nor STUDY:KEY"):
        side(f"{pair[0].path}:")
    with pytest.raises(UserError, match="has no measured plan 'abc'"):
        side(f"{pair[0].path}:abc")
    verified = answered.study(tmp_path / "verified", [task("vqa", n=4)], worse(4), ["vqa"], n=4)
    answered.study(paths.verification_folder(verified.path), [task("vqa", n=4)], worse(4), ["vqa"], n=4)
    with pytest.raises(UserError, match=f"^{re.escape(str(verified.path))} has no measured plan 'abc'"):
        side(f"{verified.path}:abc")  # who named a study is not told of the one in its folder
    few = answered.study(tmp_path / "few", [task("vqa", n=4)], worse(4), ["vqa"], n=4, plans=(NATIVE, FOUR))
    two = f"{pair[0].path}:{TWO.key[:8]}"
    told = f"{few.path} has not measured the plan of {two} (codes: {TWO.describe()}); beside STUDY:KEY, a study stands"
    with pytest.raises(UserError, match=re.escape(told)):
        compare_sides(side(str(few.path)), side(two))
    table = planted.study(tmp_path / "table", {"vqa": planted.product}, levels=(4, 16))
    with pytest.raises(UserError, match="hold no answers that could be compared"):
        compare_sides(side(str(table.path)), side(str(pair[0].path)))
    other = planted.study(tmp_path / "other", {"cider": planted.product}, levels=(4, 16))
    with pytest.raises(UserError, match=r"they share no task: .* has cider, and .* has vqa"):
        compare_sides(side(str(other.path)), side(str(pair[0].path)))
    assert compare_sides(side(f"{pair[0].path}:{NATIVE.key}"), side(str(pair[1].path))).rows[0].b.is_native
