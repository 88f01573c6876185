"""An argument of the wrong kind is refused in a sentence at the door of a public function, before a thing is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest

import sensitivity
from sensitivity import VLM, UserError, export, grid, inspect, rank, recommend, report, sweep
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study

PARTS = planted.parts()
PLAN = Plan.uniform(PARTS, None)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return planted.study(tmp_path_factory.mktemp("arguments") / "run", {"vqa": planted.product}, levels=(2, 4, 16))


STUDY = "must be a Study, such as Study('runs/a'), not 'runs/a'"
SLIPS: dict[str, tuple[Callable[..., Any], str]] = {
    "rank by path": (lambda study, vlm: rank("runs/a"), f"source {STUDY}"),
    "recommend by path": (lambda study, vlm: recommend("runs/a", bpw=3), f"study {STUDY}"),
    "report by path": (lambda study, vlm: report("runs/a", "out"), f"study {STUDY}"),
    "export by path": (lambda study, vlm: export("runs/a", PLAN, "out"), f"study {STUDY}"),
    "atlas by path": (lambda study, vlm: sensitivity.add_to_atlas("runs/a"), f"study {STUDY}"),
    "several budgets": (
        lambda study, vlm: recommend(study, bpw=[3, 4]),
        "bpw must be one number, such as 4.0, not [3, 4]; for several budgets: [recommend(study, bpw=one) for one in",
    ),
    "budget as text": (lambda study, vlm: recommend(study, bpw="3"), "bpw must be one number, such as 4.0, not '3'"),
    "run by name": (
        lambda study, vlm: recommend(study, run="org/model"),
        "run must be a VLM, such as load('org/model'), not 'org/model'",
    ),
    "run is True": (lambda study, vlm: recommend(study, run=True), "run must be a VLM, such as load('...'), not True"),
    "sweep by name": (
        lambda study, vlm: sweep("org/model", PARTS, [PLAN], "vqa", "out"),
        "vlm must be a VLM, such as load('org/model'), not 'org/model'",
    ),
    "plans as text": (
        lambda study, vlm: sweep(vlm, PARTS, ["all 4"], "vqa", "out"),
        "each of plans must be a Plan, such as choice.plan of a recommendation or one of grid(parts), not 'all 4'",
    ),
    "a task itself": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], [sensitivity.task("vqa", n=4)], "out"),
        "each of tasks must be a name, such as 'vqa', not a Task",
    ),
    "n as text": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], "vqa", "out", n="20"),
        "n must be a whole number, not '20'",
    ),
    "the whole recommendation": (
        lambda study, vlm: export(study, recommend(study, bpw=4), "out"),
        "plan must be a Plan, such as choice.plan of a recommendation or one of grid(parts), not a Recommendation",
    ),
    "report of a plan": (
        lambda study, vlm: report(study, "out", [PLAN]),
        "recommendation must be a Recommendation, such as recommend(study), not a Plan",
    ),
    "widths as text": (lambda study, vlm: grid(PARTS, bits="2,4"), "rtn takes 1 to 8 bits, not '2,4'"),
    "grid of a model": (
        lambda study, vlm: grid(vlm),
        "parts must be a ComponentMap, such as inspect(vlm), not a VLM",
    ),
    "nothing": (lambda study, vlm: inspect(None), "vlm must be a VLM, such as load('...'), not None"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_an_argument_of_the_wrong_kind_is_refused_in_a_sentence(
    slip: str, study: Study, scenes_llava: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, sentence = SLIPS[slip]
    with pytest.raises(UserError) as raised:
        call(study, scenes_llava)
    assert str(raised.value).startswith(sentence)
    assert not list(tmp_path.iterdir()), "nothing was made before the argument was looked at"


def test_a_single_plan_is_swept_like_a_list_of_one(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="part")
    study = sweep(scenes_llava, parts, Plan.uniform(parts, None), "vqa", tmp_path / "run", n=4)
    assert [trial.plan.is_native for trial in study.trials()] == [True]


def test_what_a_notebook_shows_is_a_line(study: Study) -> None:
    assert repr(study) == f"<Study {study.path} of planted on vqa: plans 27 done, 0 waiting, 0 running>"
    assert repr(sensitivity.task("vqa", n=20)) == "<Task vqa: n 20 on 4 images>"
    assert repr(PARTS) == "<ComponentMap of planted by linear: vision, connector, language>"
    assert repr(inspect("embedded:scenes-llava", by="linear")).endswith(" and 58 more>")
