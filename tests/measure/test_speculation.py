"""QSpec: drafts with rounded activations change no answer, and the rate at which they hold falls with their bits."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import saved_vlms
from few import few

from sensitivity.cli.main import main
from sensitivity.cli.verbs.speculate import show
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.speculation import GAMMA, Speculation, speculate
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task


def captions(n: int) -> Task:
    return dataclasses.replace(task("caption", n=n), exact=False)


def test_answers_are_those_of_the_verifying_weights(scenes_llava: VLM) -> None:
    parts, asked = inspect(scenes_llava, by="part"), captions(2)
    plan = Plan.uniform(parts, scheme("rtn", 4))
    with quantized(scenes_llava.model, parts, plan):
        alone = evaluate(scenes_llava, asked, plain=True)["answer"]
    rates = []
    for bits in (2, 4, 16):
        found = speculate(scenes_llava, parts, plan, asked, activations=bits)
        assert found.answers == alone
        rates.append(found.rate)
        assert 0 <= found.accepted <= found.drafted
    assert rates[0] < rates[1] <= rates[2] == 1
    assert not [m for m in scenes_llava.model.modules() if type(m).__name__ == "Linear" and m._forward_pre_hooks]


@pytest.mark.parametrize("family", few(["llava", "blip2_t5"], ["llava"]))
def test_random_models_whose_drafts_are_mostly_wrong(family: str, tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save(family, tmp_path / "model")), dtype="float32")
    parts, asked = inspect(vlm, by="part"), dataclasses.replace(captions(3), max_new_tokens=7)
    for gamma in (1, GAMMA, 10):
        found = speculate(vlm, parts, Plan.uniform(parts, None), asked, activations=2, gamma=gamma)
        assert found.answers == evaluate(vlm, asked, plain=True)["answer"]
        assert found.drafted > 0


def test_a_task_that_searches_is_refused(scenes_llava: VLM) -> None:
    parts, beams = inspect(scenes_llava, by="part"), dataclasses.replace(captions(1), search={"num_beams": 2})
    with pytest.raises(UserError, match="caption searches among several answers; drafts are verified one token at a"):
        speculate(scenes_llava, parts, Plan.uniform(parts, None), beams, activations=8)


def test_a_part_that_rounds_little_has_a_higher_rate_than_all(scenes_llava: VLM) -> None:
    parts, asked = inspect(scenes_llava, by="part"), captions(2)
    native = Plan.uniform(parts, None)
    one, every = (speculate(scenes_llava, parts, native, asked, 2, name) for name in ("connector", "*"))
    assert one.rate > every.rate
    assert one.answers == every.answers


def test_a_plan_that_rounds_cannot_verify(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 4, activations=8))
    with pytest.raises(UserError, match="the plan rounds activations already; give one that leaves them at 16 bits"):
        speculate(scenes_llava, parts, plan, captions(1))
    with pytest.raises(UserError, match="no component matches 'visoin'"):
        speculate(scenes_llava, parts, Plan.uniform(parts, None), captions(1), components="visoin")


def test_the_error_of_a_rate_is_that_of_a_ratio_over_images() -> None:
    """Against the jackknife over images, which leaves out one image after the other."""
    counts, clusters = [(6, 5), (4, 4), (9, 3), (5, 5), (7, 6)], ["a", "a", "b", "c", "d"]
    found = Speculation([""] * 5, counts, clusters)
    left = []
    for image in "abcd":
        kept = [one for one, of in zip(counts, clusters, strict=True) if of != image]
        left.append(sum(a for _, a in kept) / sum(d for d, _ in kept))
    jackknife = math.sqrt(3 / 4 * sum((rate - sum(left) / 4) ** 2 for rate in left))
    assert found.rate == 23 / 31
    assert found.error == pytest.approx(jackknife, rel=0.35)
    assert Speculation(["", ""], [(6, 5), (3, 1)], ["a", "a"]).error == math.inf


def test_the_verb_says_what_the_function_says(scenes_llava: VLM, capsys: pytest.CaptureFixture[str]) -> None:
    parts, asked = inspect(scenes_llava, by="part"), task("vqa", n=2)
    plan = Plan.uniform(parts, scheme("rtn", 2, group=32))
    expected = {name: speculate(scenes_llava, parts, plan, asked, 2, name, 2) for name in ("vision", "*")}
    line = "speculate embedded:scenes-llava --task vqa --n 2 --bits 2 --group 32 --activation-bits 2 --draft 2 --json"
    assert main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)["rates"]
    rows = {row["component"]: row for row in found}
    assert set(rows) == {*parts.names, "*"}
    for name, one in expected.items():
        assert (rows[name]["drafted"], rows[name]["accepted"]) == (one.drafted, one.accepted)
    show(found, 2)
    assert f"{expected['*'].rate:.3f}" in capsys.readouterr().out


def test_a_rate_without_a_known_error_shows_its_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each task, on so many images; nothing is known exactly because a few drafts were all right."""
    same = {"weights": "rtn:4", "component": "*", "activations": 4, "drafted": 30}
    rows = [
        {**same, "task": "vqa", "images": 3, "accepted": 30, "rate": 1.0, "error": 0.0},
        {**same, "task": "caption", "images": 20, "accepted": 15, "rate": 0.5, "error": 0.05},
        {**same, "task": "ground", "images": 1, "accepted": 15, "rate": 0.5, "error": None},
    ]
    show(rows, 3)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == ["rtn:4 vqa 3 all 1.000 (30 of 30)", "rtn:4 caption 20 all 0.500 ± 0.050",
                          "rtn:4 ground 1 all 0.500"]  # fmt: skip
