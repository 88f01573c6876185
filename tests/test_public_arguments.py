"""An argument of the wrong kind is refused in a sentence at the door of a public function, before a thing is made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from PIL import Image

import sensitivity
from sensitivity import VLM, UserError, export, grid, inspect, quantized, rank, recommend, report, scheme, size, sweep
from sensitivity.analysis.recommending.recommendation import Provenance, Recommendation
from sensitivity.formats.table import FORMATS
from sensitivity.spec.plan import Plan
from sensitivity.spec.stored_bits import CONFIGURED, FILES
from sensitivity.study.study import Study

PARTS = planted.parts()
PLAN = Plan.uniform(PARTS, None)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return planted.study(tmp_path_factory.mktemp("arguments") / "run", {"vqa": planted.product}, levels=(2, 4, 16))


def own_task(name: str) -> str:
    """A file of one question in a folder beside the one that must stay empty."""
    folder = Path.cwd().parent / f"own-{name}"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    line = {"image": "a.png", "prompt": "what?", "answers": ["top left"]}
    (folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    return f"exact:{folder / name}.jsonl"


def another(one: Recommendation) -> Provenance:
    """The provenance of a recommendation, as another model's study would have written it."""
    return {**one.provenance, "study": {**one.provenance["study"], "fingerprint": "another"}}


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
        lambda study, vlm: sweep(vlm, parts := inspect(vlm), [Plan.uniform(parts, None)], "vqa", "out", n="20"),
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
    "a task that is called like a column": (
        lambda study, vlm: sweep(vlm, inspect(vlm), [], own_task("bpw"), "out"),
        "a task cannot be called bpw: the study's table has another column of that name; rename the file",
    ),
    "a task that is called like a part": (
        lambda study, vlm: sweep(vlm, inspect(vlm, by="part"), [], own_task("vision"), "out"),
        "a task cannot be called vision: the study's table has another column of that name; rename the file",
    ),
    "no tasks": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], [], "out"),
        "a sweep needs at least one task, such as 'vqa'",
    ),
    "tasks are None": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], None, "out"),
        "each of tasks must be a name, such as 'vqa', not None",
    ),
    "a scheme for plans": (
        lambda study, vlm: sweep(vlm, PARTS, scheme("rtn", 4), "vqa", "out"),
        "each of plans must be a Plan, such as choice.plan of a recommendation or one of grid(parts), not a Scheme",
    ),
    "plans of other parts": (
        lambda study, vlm: sweep(
            vlm, inspect(vlm, by="group"), [Plan.uniform(inspect(vlm, by="part"), None)], "vqa", "o"
        ),
        "the plan is for other components: missing vision.front",
    ),
    "parts of another model": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], "vqa", "out"),
        "these parts are those of planted; parts of embedded:scenes-llava come from inspect(vlm)",
    ),
    "no folder": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], "vqa", None),
        "out must be a name or a path, not None",
    ),
    "no memory": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], "vqa", "out", memory_gb=-1),
        "memory_gb must be above 0, not -1",
    ),
    "a seed below 0": (
        lambda study, vlm: sensitivity.task("vqa", n=4, seed=-1),
        "seed must be at least 0, not -1",
    ),
    "an option that is not there": (
        lambda study, vlm: sweep(vlm, PARTS, [PLAN], "vqa", "out", see=3),
        "unknown option of sweep 'see'; choose from n, seed, plain, storage",
    ),
    "a budget in GB": (
        lambda study, vlm: recommend(study, gb=1),
        "unknown option of recommend 'gb'; choose from allow, tie, runtime, top",
    ),
    "several tasks in one": (
        lambda study, vlm: sensitivity.task(["vqa"]),
        "a task must be a name, such as 'vqa', not a list",
    ),
    "no model": (lambda study, vlm: sensitivity.load(None), "name must be a name or a path, not None"),
    "a number for a device": (
        lambda study, vlm: sensitivity.load("embedded:scenes-llava", device=3),
        "unknown device '3'; choose from cpu, cuda",
    ),
    "a width for a scheme": (
        lambda study, vlm: Plan.uniform(PARTS, 4),
        "the scheme of a component must be a Scheme, such as scheme('rtn', 4), not 4",
    ),
    "a name for a scheme": (
        lambda study, vlm: Plan.of(PARTS, {"*": "rtn:4"}),
        "the scheme of a component must be a Scheme, such as scheme('rtn', 4), not 'rtn:4'",
    ),
    "schemes without names": (
        lambda study, vlm: Plan.of(PARTS, [scheme("rtn", 4)]),
        "choice must be a dict, not a list",
    ),
    "schemes and widths": (
        lambda study, vlm: grid(PARTS, bits=3, schemes=scheme("rtn", 4)),
        "schemes have bits and settings of their own: give schemes, or bits, method and settings",
    ),
    "symmetric as text": (
        lambda study, vlm: scheme("rtn", 4, symmetric="yes"),
        "symmetric must be True or False, not 'yes'",
    ),
    "plan before parts": (
        lambda study, vlm: size(PLAN, PARTS),
        "parts must be a ComponentMap, such as inspect(vlm), not a Plan",
    ),
    "a format that is none": (lambda study, vlm: size(PARTS, PLAN, "gguff"), "unknown format 'gguff'; choose from"),
    "examples by key": (
        lambda study, vlm: study.examples(PLAN.key),
        "plan must be a Plan, such as choice.plan of a recommendation or one of grid(parts), not '",
    ),
    "compared on another task": (lambda study, vlm: study.compare(PLAN, PLAN, "vqaa"), "unknown task 'vqaa'; choose"),
    "a number as text": (lambda study, vlm: study.plan("1"), "number must be a whole number, not '1'"),
    "no place for a report": (lambda study, vlm: report(study, None), "out must be a name or a path, not None"),
    "no place for an export": (
        lambda study, vlm: export(study, study.native, None),
        "out must be a name or a path, not None",
    ),
    "a plan as text": (lambda study, vlm: Plan.from_json(PLAN.dumps()), "data must be a dict, not '"),
    "fewer resamples than none": (
        lambda study, vlm: rank(study, bootstraps=-1),
        "bootstraps must be at least 0, not -1",
    ),
    "a name for a plan in a model": (
        lambda study, vlm: quantized(vlm.model, inspect(vlm), "0").__enter__(),
        "plan must be a Plan, such as choice.plan of a recommendation or one of grid(parts), not '0'",
    ),
    "a plan of other parts in a model": (
        lambda study, vlm: quantized(vlm.model, inspect(vlm), PLAN).__enter__(),
        "the plan is for other components: missing vision.front",
    ),
    "a plan in a VLM": (
        lambda study, vlm: quantized(vlm, PARTS, PLAN).__enter__(),
        "model must be the module itself, such as vlm.model, not a VLM",
    ),
    "a sweep without weights": (
        lambda study, vlm: sweep(sensitivity.load(vlm.name, config_only=True), PARTS, [PLAN], "vqa", "out"),
        "embedded:scenes-llava was loaded without weights (config_only=True); load it with them",
    ),
    "a verification without weights": (
        lambda study, vlm: recommend(study, run=sensitivity.load(vlm.name, config_only=True)),
        "embedded:scenes-llava was loaded without weights (config_only=True); load it with them",
    ),
    "a frontier of a model": (
        lambda study, vlm: sensitivity.predict_frontier(vlm, [scheme("rtn", 4)]),
        "parts must be a ComponentMap, such as inspect(vlm), not a VLM",
    ),
    "rankings of other tasks": (
        lambda study, vlm: report(study, "out", rankings={"cap": rank(study)}),
        "unknown task 'cap'; choose from vqa",
    ),
    "a ranking for rankings": (
        lambda study, vlm: report(study, "out", rankings=rank(study)),
        "rankings must be a dict, not",
    ),
    "a report of a recommendation of others": (
        lambda study, vlm: report(study, "out", replace(one := recommend(study, bpw=4), provenance=another(one))),
        "this recommendation is not one for",
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


def test_one_of_several_stands_for_a_list_of_one(scenes_llava: VLM, study: Study, tmp_path: Path) -> None:
    parts, one = inspect(scenes_llava, by="part"), scheme("rtn", 4)
    assert grid(parts, schemes=one) == grid(parts, schemes=[one]) == grid(parts, bits=np.int64(4))
    assert grid(parts, bits=np.arange(3, 5)) == grid(parts, bits=(3, 4))
    several = grid(parts, bits=(3, 4), method=["rtn", "gptq"])
    assert len(several) == 4**3 + 1
    assert inspect(scenes_llava, include="head").names == inspect(scenes_llava, include=["head"]).names
    assert sensitivity.load(Path("embedded:scenes-llava"), config_only=True).name == scenes_llava.name
    swept = sweep(scenes_llava, parts, grid(parts, schemes=one)[:1], "vqa", tmp_path / "r", n=4, until="10min")
    assert swept.plan_named(0) == swept.plan(0)
    limits = {"allow": {"language": [2, 4]}, "tie": [("vision", "connector")]}
    alike = {"allow": {"language": [2, 4]}, "tie": ("vision", "connector")}
    assert recommend(study, bpw=4, **limits).plan == recommend(study, bpw=4, **alike).plan
    only = recommend(study, bpw=5, allow={"language": 2})
    assert only.plan["language"].bits == 2


def test_a_model_that_holds_a_plan_is_not_swept(scenes_llava: VLM, tmp_path: Path) -> None:
    """Its scores would be stored as those of full precision."""
    parts = inspect(scenes_llava, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 2))
    with quantized(scenes_llava.model, parts, plan), pytest.raises(UserError, match="holds a plan"):
        sweep(scenes_llava, parts, plan, "vqa", tmp_path / "run", n=4)
    assert not list(tmp_path.iterdir())
    assert len(sweep(scenes_llava, parts, plan, "vqa", tmp_path / "run", n=4).trials()) == 2


def test_plans_are_verified_in_the_dtype_of_their_study(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="part")
    study = sweep(scenes_llava, parts, grid(parts, bits=4), "vqa", tmp_path / "run", n=4)
    other = sensitivity.load(scenes_llava.name, dtype="bf16")
    with pytest.raises(
        UserError, match=r"was measured in float32, and this model is in bfloat16: load it with dtype='fl"
    ):
        recommend(study, bpw=5, run=other)
    assert not (study.path / "verify").exists()


def test_a_size_that_is_advised_is_large_enough(study: Study) -> None:
    """Sizes are shown with two decimals: rounded down, the one that is named would be refused again."""
    tried = 0
    for share in (0.9, 0.95, 0.99, 0.999):
        with suppress(UserError):
            recommend(study, bpw=2.0, floors={"vqa": share})
            continue
        with pytest.raises(UserError) as raised:
            recommend(study, bpw=2.0, floors={"vqa": share})
        takes = re.search(r"that takes ([0-9.]+) bpw|, ([0-9.]+) to", str(raised.value))
        assert takes, raised.value
        assert recommend(study, bpw=float(takes[1] or takes[2]), floors={"vqa": share} if takes[1] else None)
        tried += 1
    assert tried


def test_every_format_has_a_size() -> None:
    assert {*FILES, *CONFIGURED} == {*FORMATS, "float32", "float16", "bfloat16"}
    assert all(size(PARTS, PLAN, name).bits > 0 for name in FORMATS)


def test_a_single_plan_is_swept_like_a_list_of_one(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="part")
    study = sweep(scenes_llava, parts, Plan.uniform(parts, None), "vqa", tmp_path / "run", n=4)
    assert [trial.plan.is_native for trial in study.trials()] == [True]


def test_what_a_notebook_shows_is_a_line(study: Study) -> None:
    assert repr(study) == f"<Study {study.path} of planted on vqa: plans 27 done, 0 waiting, 0 running>"
    assert repr(sensitivity.task("vqa", n=20)) == "<Task vqa: n 20 on 4 images>"
    assert repr(PARTS) == "<ComponentMap of planted by linear: vision, connector, language>"
    assert repr(inspect("embedded:scenes-llava", by="linear")).endswith(" and 58 more>")
