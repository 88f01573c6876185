"""Where damage enters: what `explain` stored is drawn over the right part of the right image, and read out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answered
import numpy as np
import planted
import pytest
import torch
from answered import FOUR, HOSTILE, TWO
from browser import browser
from PIL import Image

from sensitivity.analysis.failures.changes import study_of
from sensitivity.analysis.failures.damage_places import DamagePlaces, Explained, explanations_of
from sensitivity.analysis.failures.gallery import MAX_EXPLAINED, changed, galleries
from sensitivity.analysis.reporting.failures_page import write
from sensitivity.api import explaining
from sensitivity.cli.main import main
from sensitivity.cli.output.explained_tables import print_explanation
from sensitivity.models.processors import square_seen
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example, Task, exact
from sensitivity.tasks.table import task


def given(plan: Plan, example: Example) -> str:
    return example.answers[0] if plan.key != TWO.key else "wrong"


def test_a_place_is_red_by_its_share_of_the_worst_and_what_helps_is_not(tmp_path: Path) -> None:
    study = answered.study(tmp_path / "run", [task("vqa", n=30)], given, ["vqa"], n=30)
    name = changed(study, TWO)[0].example
    answered.explain(study, TWO, True, [name])
    (found,) = explanations_of(study.path, TWO)
    one = found.examples[name]
    assert one.places == ((0.0, 1.0), (0.0, 0.5))
    assert one.question == (("what", 0.5), (HOSTILE, 1.0), (" is", 0.0))
    assert one.words.startswith("Where the damage enters: of 2 x 2 patches most at row 1, column 2; row 2, column 2")
    assert found.words == (
        "Of the damage on 1 answer that got worse, by part: vision 75 %, language 25 %. It enters at tokens of: "
        "vision 75 %, prompt 25 %."
    )


def test_the_places_are_of_what_the_model_sees() -> None:
    processors = {
        None: {"do_center_crop": False, "size": {"height": 8, "width": 8}},
        ("short", 0.5): {"do_center_crop": True, "size": {"shortest_edge": 8}, "crop_size": {"height": 4, "width": 4}},
        ("long", 1.0): {"do_pad": True, "size": {"shortest_edge": 8}},
    }
    for expected, settings in processors.items():
        assert square_seen(SimpleNamespace(image_processor=SimpleNamespace(**settings))) == expected
    frames = [DamagePlaces((), (), 0.0, square).frame(200, 100) for square in processors]
    assert frames == [(0, 0, 200, 100), (75, 25, 50, 50), (0, -50, 200, 200)]


def test_the_page_shows_red_places_and_tokens_beside_the_image(tmp_path: Path) -> None:
    study = answered.study(tmp_path / "run", [task("vqa", n=30)], given, ["vqa"], n=30)
    failed = [one.example for one in changed(study, TWO)[:3]]
    answered.explain(study, TWO, True, failed)
    answered.explain(study, TWO, False, [one.id for one in task("vqa", "calibration", n=9).examples])
    (shown,) = galleries(study, [("x", TWO)], 5)
    assert [card.places is not None for card in shown.cards] == [card.change.example in failed for card in shown.cards]
    assert len(shown.calibration) == MAX_EXPLAINED
    write(tmp_path / "page.html", "m", [shown])
    with browser() as window:
        window.open(tmp_path / "page.html")
        assert window.run("return document.querySelectorAll('.heat').length") == 3 + MAX_EXPLAINED
        assert window.run("return document.images.length") == 5 + 3 + 2 * MAX_EXPLAINED
        assert window.run("return document.querySelector('.heat').querySelectorAll('rect').length") == 2
        image, red = window.run(
            "const heat = document.querySelector('.heat');"
            "return ['img', 'rect'].map(name => heat.querySelector(name).getBoundingClientRect().toJSON())"
        )
        assert red["left"] == pytest.approx(image["left"] + image["width"] / 2, abs=1)
        assert red["top"] == pytest.approx(image["top"], abs=1)
        assert HOSTILE in window.run("return document.querySelector('.tokens').textContent")


def test_what_an_earlier_version_stored_is_left_out(tmp_path: Path) -> None:
    study = answered.study(tmp_path / "run", [task("vqa", n=30)], given, ["vqa"], n=30)
    data = answered.explain(study, TWO, True, ["a"])
    file = paths.explanation_file(study.path, TWO.key, True)
    for broken in (
        {**data, "questions": None},
        {name: data[name] for name in data if name != "data"},
        [],
        {**data, "change": None},
    ):
        file.write_text(json.dumps(broken))
        assert explanations_of(study.path, TWO) == []
    file.write_bytes(b"\xff")
    assert explanations_of(study.path, TWO) == []


def explanation(integral: object, blame: object, task: str) -> Any:
    """What `print_explanation` reads, of one calibration example."""
    facts = {"integral": integral, "blame": blame, "boxes": None, "data": [{"task": task}]}
    return SimpleNamespace(plan=TWO, examples=[1], of_failures=False, **facts)


@pytest.mark.parametrize(("language", "said"), [(-0.009, True), (0.001, False)])
def test_shares_of_a_change_that_nearly_cancels_are_said_to_mean_little(
    language: float, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    change = 0.01 + language
    integral = SimpleNamespace(change=change, before=0.1, after=0.1 + change, passes=2, missing=0.001)
    blame = SimpleNamespace(components={"vision": 0.01, "language": language}, modalities={}, regions={})
    print_explanation(explanation(integral, blame, "vqa"))
    assert ("shares of so small a change say little" in capsys.readouterr().out) == said


def test_small_losses_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    integral = SimpleNamespace(change=2e-6, before=1e-6, after=3e-6, passes=2, missing=0.001)
    blame = SimpleNamespace(components={"vision": 2e-6}, modalities={}, regions={})
    print_explanation(explanation(integral, blame, "vqa"))
    assert "the loss of right answers rises from 1e-06 to 3e-06 on" in capsys.readouterr().out


def test_a_loss_that_falls_is_not_said_to_rise_and_zeros_have_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    integral = SimpleNamespace(change=-0.1, before=0.3, after=0.2, passes=2, missing=0.001)
    places = torch.tensor([[-0.06, 0.0], [0.0, -0.02]])
    parts = {"vision": -0.1, "connector": 0.0}
    blame = SimpleNamespace(components=parts, modalities={"vision": -0.1, "text": 0.0}, regions={0: places})
    print_explanation(explanation(integral, blame, "caption"))
    said = capsys.readouterr().out
    assert "the loss of right answers falls from 0.3000 to 0.2000 on 1 calibration example of caption" in said
    assert "rises" not in said
    assert "-0.0" not in said
    assert "in percent: 80.0 in all; 20.0 more is of vision tokens that are no patches" in said
    assert said.index("row") < said.index("60.0")


def test_a_plan_is_found_by_its_number_or_by_as_much_of_its_key_as_is_its_own(tmp_path: Path) -> None:
    study = answered.study(tmp_path / "run", [task("vqa", n=4)], given, ["vqa"], n=4)
    for wanted in ("2", TWO.key[:4], TWO.key):
        assert explaining.plan_to_explain(study, wanted).key == TWO.key
    with pytest.raises(UserError, match=rf"plan 'zz'; plans by .* key: 0 .*, 1 {FOUR.key[:8]}, 2 {TWO.key[:8]} \("):
        explaining.plan_to_explain(study, "zz")


def test_only_failures_of_the_requested_tasks_are_explained(tmp_path: Path) -> None:
    asked = [task("vqa", n=30), task("caption", n=30)]
    study = answered.study(tmp_path / "run", asked, given, ["vqa", "caption"], n=30)
    assert {one.task for one in changed(study, TWO)} == {one.name for one in asked}
    for name in ("vqa", "caption"):
        assert {one.name for one in explaining._failing_tasks(study, TWO, [name], 5)} == {task(name, n=1).name}


def test_nothing_is_explained_where_full_precision_scores_nothing(tmp_path: Path) -> None:
    asked = [task("vqa", n=4), task("scene", n=4)]
    scenes = {example.id for example in asked[1].examples}

    def no_scene(plan: Plan, example: Example) -> str:
        return "wrong" if example.id in scenes else given(plan, example)

    study = answered.study(tmp_path / "run", asked, no_scene, ["vqa", "scene"], n=4)
    assert study.trials()[0].scores["scene"]["mean"] == 0
    with pytest.raises(UserError, match=r"full precision scores 0 on scene, so that no plan damages it: there is noth"):
        explaining.tasks_to_explain(study, ["scene"])
    with pytest.warns(Notice, match="full precision scores 0 on scene, so that no plan damages it: left out"):
        assert explaining.tasks_to_explain(study) == ["vqa"]


def test_a_task_is_explained_by_its_name_in_the_study(tmp_path: Path) -> None:
    picture, line = tmp_path / "a.png", {"image": "a.png", "prompt": "what?", "answers": ["top left"]}
    Image.new("RGB", (32, 32)).save(picture)
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    typed = f"exact:{tmp_path / 'mine.jsonl'}"
    study = answered.study(tmp_path / "run", [task(typed)], given, [typed], n=4)
    assert explaining.tasks_to_explain(study, ["mine"]) == [typed] == explaining.tasks_to_explain(study, [typed])


def test_a_loss_that_stays_has_no_shares(capsys: pytest.CaptureFixture[str]) -> None:
    integral = SimpleNamespace(change=0.0, before=0.1, after=0.1, passes=2, missing=0.0)
    blame = SimpleNamespace(components={"vision": 0.0}, modalities={}, regions={})
    print_explanation(explanation(integral, blame, "vqa"))
    said = capsys.readouterr().out
    assert "the loss of right answers stays at 0.1000 on 1 calibration example of vqa: nothing is shared out" in said
    assert "Share of that change" not in said


def test_what_was_explained_of_each_task_is_kept(tmp_path: Path) -> None:
    line = f"sweep embedded:scenes-llava --task vqa,caption --n 2 --bits 2 --by part --out {tmp_path / 'run'}"
    assert main([*line.split(), "--search", "one-at-a-time"]) == 0
    study = Study(tmp_path / "run")
    plan = next(trial.plan for trial in study.trials() if not trial.plan.is_native)
    for more in ("1 --task vqa", "1 --task caption", "2"):
        assert main(f"explain {study.path} --plan {plan.key} --calibration-n {more}".split()) == 0
    files = [file.name for file in paths.explanation_files(study.path, plan.key)]
    assert files == [f"{plan.key}-caption.json", f"{plan.key}-vqa.json", f"{plan.key}.json"]
    said = [one.words.partition(", by part")[0] for one in explanations_of(study.path, plan)]
    assert "Of the damage on 1 calibration example of caption" in said
    assert "Of the damage on 2 calibration examples of vqa and caption" in said


def test_places_are_of_the_task_that_was_explained(tmp_path: Path) -> None:
    study = answered.study(tmp_path / "run", [task("vqa", n=30)], given, ["vqa"], n=30)
    data = answered.explain(study, TWO, True, ["a"])
    file = paths.explanation_file(study.path, TWO.key, True, ["own/vqa"])
    file.write_text(json.dumps({**data, "data": [{**one, "name": "own/vqa"} for one in data["data"]]}))
    assert file.name == f"{TWO.key}-own-vqa-failures.json"
    old, new = explanations_of(study.path, TWO)
    assert new.of_failures
    assert old.places_in("vqa", "a") is not None  # an earlier version did not store the task's name
    assert new.places_in("vqa", "a") is None
    assert new.places_in("own/vqa", "a") is not None


def test_answers_that_got_worse_are_explained_on_their_own_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["sweep", "embedded:scenes-llava", "--n", "6", "--bits", "2", "--search", "one-at-a-time", "--by", "part"]
    assert main([*line, "--out", str(tmp_path / "run")]) == 0
    study = Study(tmp_path / "run")
    plan = next(trial.plan for trial in study.trials() if trial.plan.is_uniform and not trial.plan.is_native)
    capsys.readouterr()
    assert main(["explain", str(study.path), "--plan", plan.key, "--failures", "1"]) == 0
    assert "on 1 answer that got worse" in capsys.readouterr().out
    worst = {one.example for one in changed(study_of(study, plan), plan)[:1]}
    (found,) = explanations_of(study.path, plan)
    assert set(found.examples) == worst
    asked = {one.id: one.prompt for one in task("vqa", n=6).examples}
    for name, one in found.examples.items():
        assert asked[name] in "".join(piece for piece, _ in one.question)
        assert {len(row) for row in one.places} == {len(one.places)}
        assert max(value for row in one.places for value in row) == 1
    (shown,) = galleries(study, [("x", plan)], 5)
    assert {card.change.example for card in shown.cards if card.places} == worst
    native = study.native.key
    assert main(["explain", str(study.path), "--plan", native, "--failures", "2"]) == 2
    assert "full precision has no damage to explain" in capsys.readouterr().err


def test_equal_ids_of_two_tasks_stay_apart(tmp_path: Path) -> None:
    """Lines of two files are numbered alike."""
    image = np.zeros((4, 4, 3), np.uint8)
    name = "x-0-1"
    tasks = [Task(one, (Example(name, name, "all", image, "where?", ("there",)),), exact) for one in ("a", "b")]
    study = answered.study(tmp_path, tasks, given)
    frame = study.examples(TWO)
    assert frame is not None
    names = explaining.names_of([*zip(frame["task"], frame["example"], strict=True), ("a", "x-0-2")])
    assert names == ("x-0-1 of a", "x-0-1 of b", "x-0-2")
    told = {"a": 1.0, "b": 3.0, "alone": 2.0}
    places = {
        f"{name} of a": DamagePlaces((), (), told["a"], None),
        f"{name} of b": DamagePlaces((), (), told["b"], None),
        "x-0-2": DamagePlaces((), (), told["alone"], None),
    }
    found = Explained({}, {}, 1.0, 3, True, places, [{"name": "a"}, {"name": "b"}])
    for task_name, example, damage in (("a", name, 1.0), ("b", name, 3.0), ("a", "x-0-2", 2.0)):
        there = found.places_in(task_name, example)
        assert there is not None
        assert there.damage == damage
    assert found.places_in("c", name) is None


def test_boxes_of_two_tasks_with_equal_ids_are_not_taken_for_one_another(tmp_path: Path) -> None:
    image, name = np.zeros((4, 4, 3), np.uint8), "x-0-1"
    right = {"a": "{<10><20><30><40>|<0>}", "b": "{<50><60><70><80>|<0>}"}
    tasks = [Task(one, (Example(name, name, one, image, "where?", (box,)),), exact) for one, box in right.items()]

    def moved(plan: Plan, example: Example) -> str:
        return right["b"] if plan.key == TWO.key else right[example.kind]

    study = answered.study(tmp_path, tasks, moved)
    assert set(explaining.distances_in(study, TWO, ["a", "b"]).values()) == {0.0, 20.0}  # 40 in one task of two


def test_what_of_a_study_cannot_be_explained_is_said_with_what_to_type(tmp_path: Path) -> None:
    facts = {"model": "m", "fingerprint": "f", "n": 4, "seed": 0}
    parts = planted.parts()
    both = Study.create(tmp_path / "both", parts, ["retrieval", "vqa"], facts | {"tasks": ["retrieval", "vqa"]})
    with pytest.raises(UserError, match=r"^retrieval ranks images and captions, .*; leave it out: --task vqa$"):
        explaining.tasks_to_explain(both)
    ranked = Study.create(tmp_path / "ranked", parts, ["retrieval"], facts | {"tasks": ["retrieval"]})
    with pytest.raises(UserError, match=r"whose loss could be divided among parts$"):
        explaining.tasks_to_explain(ranked)
    lines = tmp_path / "mine.jsonl"
    own = Study.create(tmp_path / "own", parts, ["mine"], facts | {"tasks": [str(lines)]})
    with pytest.raises(UserError, match=r"own was measured: .*mine.jsonl is not there; put its data back$"):
        explaining.tasks_to_explain(own)
    lines.write_text(json.dumps({"image": "pics/gone.png", "prompt": "what?", "answers": ["a"]}))
    with pytest.raises(UserError, match=r"own was measured: .* no image file \(.*pics/gone.png\).*its data back$"):
        explaining.tasks_to_explain(own)
