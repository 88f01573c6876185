"""QSpec: drafts with rounded activations change no answer, and the rate at which they hold falls with their bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import saved_vlms
from few import few

from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.speculation import GAMMA, speculate
from sensitivity.models.discover import inspect
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


def test_a_part_that_rounds_little_has_a_higher_rate_than_all(scenes_llava: VLM) -> None:
    parts, asked = inspect(scenes_llava, by="part"), captions(2)
    native = Plan.uniform(parts, None)
    one, every = (speculate(scenes_llava, parts, native, asked, 3, name) for name in ("connector", "*"))
    assert one.rate > every.rate
    assert one.answers == every.answers


def test_a_plan_that_rounds_cannot_verify(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 4, activations=8))
    with pytest.raises(UserError, match="the plan that verifies leaves activations at 16 bits"):
        speculate(scenes_llava, parts, plan, captions(1))
    with pytest.raises(UserError, match="no component matches 'visoin'"):
        speculate(scenes_llava, parts, Plan.uniform(parts, None), captions(1), components="visoin")
