"""What breaks: the counts and changes are those of the answers, and the gallery shows them, images or not."""

from __future__ import annotations

import io
import json
import re
import time
import warnings
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import answered
import numpy as np
import pandas as pd
import planted
import pytest
from answered import FOUR, NATIVE, TWO
from browser import browser
from PIL import Image

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.failures import pictures
from sensitivity.analysis.failures.changes import changed_answers, study_of
from sensitivity.analysis.failures.gallery import galleries
from sensitivity.analysis.recommending.judging import judge, unmeasured
from sensitivity.analysis.reporting.failures_page import write
from sensitivity.analysis.reporting.page import report
from sensitivity.analysis.reporting.what_breaks import failing
from sensitivity.cli.main import main
from sensitivity.cli.output.tables import print_answer_counts
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.examples import questions
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

HOSTILE = "</script><img src=x onerror=alert(1)>\"'`{{7*7}}"


def given(plan: Plan, example: Example) -> str:
    """Full precision is right but for every seventh example; fewer bits err more, say nothing, or ramble."""
    number, right = int(re.sub(r"\D", "", example.id)[-6:]), example.answers[0]
    if plan.is_native:
        return right if number % 7 else "no idea"
    if number % (3 if plan.key == TWO.key else 5) == 0:
        return ("", "rambling on and on and on", "wrong")[number % 3]
    return right


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two tasks of the embedded models, whose images are drawn anew from the seed."""
    tasks = [task(name, n=100) for name in ("vqa", "ground")]
    return answered.study(tmp_path_factory.mktemp("failures") / "run", tasks, given, ["vqa", "ground"])


def test_counts_are_those_of_the_answers(study: Study) -> None:
    table = study.table().set_index("key")
    native = study.examples(NATIVE)
    assert native is not None
    for plan in (NATIVE, FOUR, TWO):
        rows = study.examples(plan)
        assert rows is not None
        kinds = {(row["task"], row["kind"]): row for row in study.counts_by_kind(plan)}
        for name in ("vqa", "ground"):
            mine, full = (frame[frame["task"] == name].set_index("example") for frame in (rows, native))
            said = list(mine["answer"])
            expected = {
                "to_wrong": sum(mine["score"] < full["score"]), "to_right": sum(mine["score"] > full["score"]),
                "empty": said.count(""), "cut": sum(len(text) > 20 for text in said),
                "malformed": sum("{" not in text for text in said) if name == "ground" else 0,
            }  # fmt: skip
            known = {what: table.loc[plan.key].get(f"{name}.{what}") for what in expected}
            if plan is NATIVE:
                assert pd.isna([known.pop("to_wrong"), known.pop("to_right")]).all()
            assert known == {what: expected[what] for what in known}
            whole = kinds[name, None]
            assert {what: whole[what] for what in known} == known
            parts = [row for (of, kind), row in kinds.items() if of == name and kind is not None]
            assert (len(parts) > 1) == (name == "vqa")
            for what in known if parts else ():
                assert sum(row[what] for row in parts) == whole[what]
    assert table.loc[TWO.key, "vqa.to_wrong"] > 0 < table.loc[TWO.key, "vqa.to_right"]


def test_boxes_are_kept_beside_questions_without_any(study: Study) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = questions.read_questions(study.path, {})
    for name in ("vqa", "ground"):
        for example in task(name, n=study.meta["n"]).examples:
            assert (kept[name, example.id].regions, kept[name, example.id].prompt) == (example.regions, example.prompt)


def test_answers_of_an_earlier_version_are_not_counted_as_none(tmp_path: Path) -> None:
    made = answered.study(tmp_path / "run", [task("vqa", n=20)], given, ["vqa"])
    file = next((tmp_path / "run" / "examples").glob(f"{TWO.key}.parquet"))
    pd.read_parquet(file).drop(columns=["cut", "malformed"]).to_parquet(file, index=False)
    row = Study(made.path).table().set_index("key").loc[TWO.key]
    assert row["vqa.empty"] > 0
    assert pd.isna(row["vqa.cut"])
    (whole, *_) = Study(made.path).counts_by_kind(TWO)
    assert whole["cut"] is whole["malformed"] is None
    pd.read_parquet(file).assign(cut="x").to_parquet(file, index=False)
    with pytest.warns(UserWarning, match="'cut' is not true or false"):
        assert Study(made.path).examples(TWO) is None


def test_changes_are_all_that_differ_and_those_that_cost_most_come_first(study: Study) -> None:
    after, before = study.examples(TWO), study.examples(NATIVE)
    assert after is not None
    assert before is not None
    found = changed_answers(after, before, questions.read_questions(study.path, study.meta))
    both = before.merge(after, on=["task", "example"])
    differ = both[both["answer_x"] != both["answer_y"]]
    assert {(one.task, one.example) for one in found} == set(zip(differ["task"], differ["example"], strict=True))
    costs = [one.cost for one in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 1 > -1 == costs[-1]
    asked = {example.id: example for name in ("vqa", "ground") for example in task(name, n=100).examples}
    for one in found:
        assert one.question is not None
        assert (one.question.prompt, one.question.answers) == (asked[one.example].prompt, asked[one.example].answers)
        assert one.before.sure == pytest.approx(np.exp(-0.1))
    only = changed_answers(after, before, {}, "vqa", "count")
    assert {one.kind for one in only} == {"count"}
    assert {one.question for one in only} == {None}
    with pytest.raises(UserError, match="unknown kind 'cuont'; choose from colour, count"):
        changed_answers(after, before, {}, "vqa", "cuont")


def image_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(uri.partition(",")[2])))


def test_pictures_are_those_of_the_examples_with_boxes_where_there_are_some(study: Study) -> None:
    (found,) = galleries(study, [("x", TWO)], 1000)
    assert found.notes == ()
    images = {example.id: example.image for name in ("vqa", "ground") for example in task(name, n=100).examples}
    for card in found.cards:
        (one,) = card.pictures
        assert np.array_equal(np.asarray(image_of(one.uri)), images[card.change.example])
        whose = [of for of, _ in one.boxes]
        assert ("right" in whose) == (card.change.task == "ground")
        assert ("before" in whose) == (card.change.before.answer.startswith("{"))


def own(folder: Path, count: int, size: tuple[int, int], prompt: str = "what?", name: str = "{}.jpg") -> str:
    draw, lines = np.random.default_rng(0), []
    for number in range(count):
        noise = draw.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name.format(number), "JPEG", quality=90)
        lines.append({"image": name.format(number), "prompt": prompt, "answers": [prompt], "kind": prompt,
                      "split": "evaluation"})  # fmt: skip
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "q.jsonl")


def test_where_images_are_gone_the_gallery_says_so_and_shows_text(tmp_path: Path) -> None:
    file = own(tmp_path, 8, (40, 30), "how many?")
    made = answered.study(tmp_path / "run", [task(file)], given, [file])
    assert galleries(made, [("x", TWO)], 9)[0].notes == ()
    for image in tmp_path.glob("*.jpg"):
        image.unlink()
    (tmp_path / "q.jsonl").unlink()
    (found,) = galleries(Study(made.path), [("x", TWO)], 9)
    assert re.fullmatch(r"The images of 3 examples were not found \(such as .*\.jpg\): .*text\.", found.notes[0])
    write(tmp_path / "page.html", "m", [found])
    text = (tmp_path / "page.html").read_text()
    assert "how many?" in text
    assert "were not found" in text
    (made.path / "questions.parquet").unlink()
    (found,) = galleries(Study(made.path), [("x", TWO)], 9)
    assert "Questions and right answers are not known" in found.notes[1]


def test_large_photographs_become_small_upright_pictures(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "a.jpg", exif=exif, quality=95)
    began = time.process_time()
    found = pictures.picture(tmp_path / "a.jpg")
    assert time.process_time() - began < 1
    assert found is not None
    assert (found.width, found.height) == (1500, 2000)
    assert image_of(found.uri).size == (240, 320)
    assert len(found.uri) < 1.4 * pictures.MAX_BYTES
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1000])
    assert pictures.picture(tmp_path / "cut.jpg") is None
    assert pictures.picture(tmp_path) is None


def test_hostile_questions_answers_and_names_stay_text(tmp_path: Path) -> None:
    file = own(tmp_path, 30, (40, 30), HOSTILE, "{}<b>&\"'.jpg")
    half = "\ud800"

    def hostile(plan: Plan, example: Example) -> str:
        return f"{given(plan, example)}{HOSTILE}" if plan.is_native else HOSTILE

    made = answered.study(tmp_path / "run", [task(file)], hostile, [file])
    (found,) = galleries(made, [(HOSTILE, TWO)], 60)
    write(tmp_path / "page.html", HOSTILE + half, [found])
    text = (tmp_path / "page.html").read_text()
    assert "<img src=x" not in text
    with browser() as window:
        window.open(tmp_path / "page.html")
        assert window.run("return document.images.length") == len(found.cards) > 3
        assert window.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert HOSTILE in window.run("return document.querySelector('.change p').textContent")
        assert "49" not in window.run("return document.querySelector('.change').textContent").replace("7*7", "")
        assert window.run("return performance.getEntriesByType('resource').length") == 0


def test_a_filter_shows_the_questions_of_one_kind(study: Study, tmp_path: Path) -> None:
    write(tmp_path / "page.html", "m", galleries(study, [("x", TWO)], 60))
    with browser() as window:
        window.open(tmp_path / "page.html")
        seen = "return [...document.querySelectorAll('.change')].filter(c => c.offsetParent).map(c => c.dataset.kind)"
        assert len(set(window.run(seen))) > 3
        window.run(
            "const s = document.querySelector('select'); s.value = 'count'; s.dispatchEvent(new Event('change'))"
        )
        assert set(window.run(seen)) == {"count"}


def test_a_report_says_on_which_examples_a_plan_was_run(tmp_path: Path) -> None:
    made = answered.study(tmp_path / "run", [task("ground", n=8)], given, ["ground"], n=8, plans=[NATIVE, FOUR, TWO])
    chosen = replace(unmeasured(made, solve(made, bpw=15.0)), plan=FOUR)
    assert [one.title for one in failing(made, [chosen])[0]] == ["The recommended plan, on the examples of the sweep"]
    verified = paths.verification_folder(made.path)
    answered.study(verified, [task("ground", n=8)], given, ["ground"], n=8, plans=[NATIVE, FOUR])
    assert [one.title for one in failing(made, [chosen])[0]] == [
        "The recommended plan, on the examples of the verification"
    ]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_report_with_sixty_pictures_stays_small_and_quick(whole: bool, tmp_path: Path) -> None:
    file = own(tmp_path, 60, (640, 480))
    plans = [NATIVE, *(planted.plan(planted.PARTS, row) for row in planted.grid((4, 16))[:-1])]

    def answer(plan: Plan, example: Example) -> str:
        return "what?" if plan.is_native else plan.key

    made = answered.study(tmp_path / "run", [task(file)], answer, [file], plans=plans)
    first, second, third = solve(made, bpw=15.0, top=3)
    frames = {trial.key: rows for trial in made.trials() if (rows := made.examples(trial.plan)) is not None}
    chosen = judge(made, [first, second], third, frames)
    began = time.perf_counter()
    shown, _ = failing(made, [chosen])
    assert time.perf_counter() - began < 10
    assert sum(len(card.pictures) for one in shown for card in one.cards) == 60
    page = tmp_path / "page.html"
    write(page, "m", shown)
    assert 1_000_000 < page.stat().st_size < 7_000_000  # the rest of a report has a few hundred thousand bytes
    if whole:
        assert report(made, tmp_path / "report", chosen, bootstraps=1).stat().st_size < 8_000_000


def test_an_imported_table_has_no_answers(tmp_path: Path) -> None:
    made = planted.study(tmp_path / "table", {"vqa": planted.product}, levels=(4, 16))
    with pytest.raises(UserError, match=r"has no answers to single examples, .* imported and a study that was shared"):
        study_of(made, made.trials()[0].plan)


def test_a_plan_that_was_predicted_and_not_run_is_no_dead_end(study: Study) -> None:
    predicted = planted.plan(planted.PARTS, [2, 4, 4])
    with pytest.raises(UserError, match=r"was not run. `recommend` without --no-run runs .*; --plan KEY names one"):
        study_of(study, predicted)


def test_it_is_said_on_which_examples_a_plan_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = answered.study(tmp_path / "run", [task("vqa", n=20)], given, ["vqa"], n=20)
    verified = paths.verification_folder(made.path)
    answered.study(verified, [task("vqa", n=20, seed=1)], given, ["vqa"], n=20, seed=1, plans=(NATIVE, FOUR))
    out = tmp_path / "failures.html"
    for plan, where in ((FOUR, "verification"), (TWO, "sweep")):
        assert main(["failures", str(made.path), "--plan", plan.key, "--out", str(out)]) == 0
        assert f"on the examples of the {where} (changes" in capsys.readouterr().out
        assert f"What breaks first, on the examples of the {where}" in out.read_text()


def test_a_prediction_does_not_show_answers_of_an_earlier_verification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = answered.study(tmp_path / "run", [task("vqa", n=20)], given, ["vqa"], n=20)
    best = solve(made, bpw=15.0, top=1)[0].plan
    verified = paths.verification_folder(made.path)
    answered.study(verified, [task("vqa", n=20, seed=1)], given, ["vqa"], n=20, seed=1, plans=(NATIVE, best))
    assert study_of(made, best).path == verified
    assert main(["recommend", str(made.path), "--bpw", "15", "--no-run"]) == 0
    out = capsys.readouterr().out
    before = next(one.scores["vqa"] for one in Study(verified).measured() if one.key == best.key)
    told = "Predicted only: nothing was run now to check it; an earlier verification measured vqa "
    told += f"{before['mean']:.3f} [{before['low']:.3f}, {before['high']:.3f}]"
    assert told in out
    assert "What happened to the answers" not in out
    card = (made.path / "plan.md").read_text()  # its table of scores is the verification's
    assert "an earlier verification measured vqa " in card
    assert f"| vqa | {before['mean']:.4f} |" in card


def test_the_command_for_causes_measures_those_that_are_counted(study: Study) -> None:
    """Of this task and kind alone, and of all of them, not of the first 20."""
    (whole,), (some,) = galleries(study, [("x", TWO)], 5), galleries(study, [("x", TWO)], 5, "vqa", "count")
    start = f"sensitivity failures {study.path} --plan {TWO.key[:8]}"
    assert whole.unexplained > 20
    assert whole.ask == f"{start} --n {whole.unexplained} --causes"
    assert 0 < some.unexplained <= 20
    assert some.ask == f"{start} --task vqa --kind count --causes"


def test_no_cause_is_offered_where_images_are_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank is one among all images: no example can be run alone."""
    name = replace(task("vqa", n=20), name="retrieval")
    made = answered.study(tmp_path / "run", [name], given, ["retrieval"], n=20)
    assert main(["failures", str(made.path), "--plan", TWO.key]) == 0
    out = capsys.readouterr().out
    assert "Changed answers" in out
    assert "--causes" not in out
    assert main(["failures", str(made.path), "--plan", TWO.key, "--causes"]) == 2
    assert "no single one can be run to find a cause" in capsys.readouterr().err


def test_the_verb(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "failures.html"
    words = ["failures", str(study.path), "--plan", TWO.key[:6], "--kind", "count", "--n", "3", "--out", str(page)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Changed answers: 3 of" in out
    assert "right → wrong" in out
    assert main([*words, "--json"]) == 0  # over its own page
    found = json.loads(capsys.readouterr().out)
    assert found["key"] == TWO.key
    assert [one["kind"] for one in found["examples"]] == ["count"] * 3
    assert [row["kind"] for row in found["answers"]] == ["count"]
    page.write_text("<p>mine</p>")
    assert main(words) == 2
    assert "it is not a page that sensitivity wrote" in capsys.readouterr().err
    assert page.read_text() == "<p>mine</p>"
    assert main(["failures", str(study.path), "--plan", "zz"]) == 2
    assert "has no measured plan 'zz'; plans by number and key: " in capsys.readouterr().err
    assert main(["failures", str(study.path)]) == 0  # without a recommendation, the low end of the frontier


def test_a_plan_is_named_once_and_each_changed_answer_by_its_example_and_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    counted = [{"task": "vqa", "kind": kind, "n": 5, "score": 0.5, "empty": 0} for kind in ("", "color", "shape")]
    print_answer_counts({"aaaa for 3 bpw": counted, "bbbb for 4 bpw": counted})
    out = capsys.readouterr().out
    assert (out.count("aaaa"), out.count("bbbb"), out.count("shape")) == (1, 1, 2)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    asked = task("vqa", n=20)
    asked = replace(asked, examples=tuple(replace(one, image=tmp_path / "a.png") for one in asked.examples))
    made = answered.study(tmp_path / "run", [asked], given, ["vqa"], n=20)
    assert main(["failures", str(made.path), "--plan", TWO.key, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["examples"]
    assert main(["failures", str(made.path), "--plan", TWO.key]) == 0
    out = capsys.readouterr().out
    assert all(f"{one['example']}, a.png" in out for one in found)
