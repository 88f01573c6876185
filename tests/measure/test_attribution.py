"""Attributions: scores as their formulas say, and a path integral whose terms are the whole change of the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import saved_vlms
import torch
from few import few
from torch import Tensor

from sensitivity.measure.attribution import scores as scoring
from sensitivity.measure.attribution.blame import Blame, blame, square, together
from sensitivity.measure.attribution.scores import SCORES, Calibrated, attribute
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibrate, calibration_examples
from sensitivity.measure.gradients.backward import backward
from sensitivity.measure.gradients.path_integral import PathIntegral, path_integral
from sensitivity.measure.passes.token_batches import VISION, TokenBatch, batches
from sensitivity.models.discover import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan

FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]
BITS = (2, 4)


def calibrated(vlm: VLM, by: str = "part", n: int = 4) -> Calibrated:
    parts = inspect(vlm, by=by)
    data = calibration_examples(["vqa"], n, 0)
    schemes = [scheme("rtn", bits) for bits in BITS]
    return Calibrated(vlm, parts, schemes, calibrate(vlm, parts, ["vqa"], n), lambda rows: batches(vlm, data, rows))


@pytest.fixture(scope="module")
def given(scenes_llava: VLM) -> Calibrated:
    return calibrated(scenes_llava, n=2)


def layers(given: Calibrated) -> dict[str, list[tuple[Tensor, Tensor, TokenBatch]]]:
    """What each layer reads, the gradient of what it returns, and the batch: all kept in memory."""
    found: dict[str, list[tuple[Tensor, Tensor, TokenBatch]]] = {}
    for batch in given.data(1):

        def visit(weight: Weight, inputs: Tensor, gradient: Tensor, batch: TokenBatch = batch) -> None:
            found.setdefault(weight.name, []).append((inputs, gradient, batch))

        backward(given.vlm, given.weights, batch, visit)
    return found


def test_scores_are_their_formulas(given: Calibrated) -> None:
    """Each layer by itself, from its inputs and gradients; the sums over a component are the scores."""
    found = {one.name: one for one in attribute(given, ["weight", "gram", "fisher", "change"])}
    seen = layers(given)
    expected = {name: {part: [0.0] * len(BITS) for part in given.parts.names} for name in found}
    for weight in given.weights:
        own = given.vlm.model.get_parameter(weight.name).detach().float()
        for i, chosen in enumerate(given.schemes):
            with_plan = plan_changes(given.vlm.model, given.parts, Plan.uniform(given.parts, chosen))
            error = with_plan[weight.name].float()
            expected["weight"][weight.part][i] += float(error.norm() ** 2 / own.norm() ** 2)
            if weight.name not in seen:
                continue
            inputs = torch.cat([read for read, _, _ in seen[weight.name]]).float()
            expected["gram"][weight.part][i] += float((inputs @ error.T).norm() ** 2 / (inputs @ own.T).norm() ** 2)
            for read, gradient, _ in seen[weight.name]:  # one example in each batch
                products = (read.float() @ error.T) * gradient
                expected["fisher"][weight.part][i] += float(products.square().sum())
                expected["change"][weight.part][i] += abs(float(products.sum()))
    for name, by_part in expected.items():
        for part, values in by_part.items():
            if name == "gram" and part == "vision":
                continue  # its last block is run and has statistics, but no gradient, so that it was left out above
            ours = [found[name].scores[part][chosen] for chosen in given.schemes]
            assert ours == pytest.approx(values, rel=2e-3), (name, part)
        assert found[name].seconds > 0
    for one in found.values():  # two bits do more damage than four, whatever counts it
        assert all(row[given.schemes[0]] > row[given.schemes[1]] for row in one.scores.values())


def test_the_last_score_is_a_path_and_every_score_is_refused_by_name(given: Calibrated) -> None:
    with pytest.raises(UserError, match=r"unknown score 'grams'.*did you mean gram"):
        attribute(given, ["grams"])
    (found,) = attribute(replace(given, schemes=given.schemes[1:]), ["path"])
    integral = integrated(given, Plan.uniform(given.parts, given.schemes[1]))
    total = sum(row[given.schemes[1]] for row in found.scores.values())
    assert total == pytest.approx(integral.change, rel=0.011)
    assert set(SCORES) >= {"weight", "gram", "fisher", "change", "path"}


def integrated(given: Calibrated, plan: Plan, **how: Any) -> PathIntegral:
    changes = plan_changes(given.vlm.model, given.parts, plan, given.statistics)
    return path_integral(given.vlm, given.parts, changes, lambda: given.data(4), **how)


@pytest.mark.parametrize("bits", few([2, 3, 6], [2]))
def test_the_terms_sum_to_the_whole_change(given: Calibrated, bits: int) -> None:
    before = {name: p.detach().clone() for name, p in given.vlm.model.named_parameters()}
    found = integrated(given, Plan.uniform(given.parts, scheme("rtn", bits)))
    assert found.missing <= 0.0101
    assert found.passes >= 2
    assert all(torch.equal(before[name], p) for name, p in given.vlm.model.named_parameters())
    told = blame(given.parts, given.vlm.family, found)
    for table in (told.components, told.modalities):
        assert sum(table.values()) == pytest.approx(found.total)
    assert set(told.modalities) == {"vision", "prompt", "answer"}


def test_too_few_steps_are_not_enough_at_two_bits(given: Calibrated) -> None:
    """Why the path is followed until the terms sum up: one piece of it misses the change by far."""
    coarse = integrated(given, Plan.uniform(given.parts, given.schemes[0]), most=2)
    assert coarse.passes == 2
    assert coarse.missing > 0.02


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", few(FAMILIES, ["blip2_t5", "qwen2_vl"]))
def test_the_terms_sum_up_in_every_family(name: str, tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save(name, tmp_path / "model")), dtype="float32")
    given = calibrated(vlm, "kind", 2)
    found = integrated(given, Plan.uniform(given.parts, scheme("rtn", 2)))
    assert abs(found.change) > 1e-4
    assert found.missing <= 0.0101


def test_what_a_plan_leaves_alone_has_no_blame(given: Calibrated) -> None:
    told = told_of(given, Plan.of(given.parts, {"language": given.schemes[0]}))
    assert told.components["vision"] == told.components["connector"] == 0.0
    assert abs(told.components["language"]) > 0


def told_of(given: Calibrated, plan: Plan) -> Blame:
    return blame(given.parts, given.vlm.family, integrated(given, plan))


def test_damage_in_a_tower_is_of_the_image_and_of_every_patch(given: Calibrated) -> None:
    told = told_of(given, Plan.of(given.parts, {"vision": given.schemes[0]}))
    assert told.modalities["prompt"] == told.modalities["answer"] == 0.0
    patches = given.vlm.model.config.vision_config.image_size // given.vlm.model.config.vision_config.patch_size
    assert {tuple(grid.shape) for grid in told.regions.values()} == {(patches, patches)}
    assert len(told.regions) == 2


def test_biases_are_part_of_the_change(scenes_llava: VLM) -> None:
    given = calibrated(scenes_llava, n=2)
    plan = Plan.of(given.parts, {"vision": scheme("rtn", 3, biases=True)})
    changes = plan_changes(given.vlm.model, given.parts, plan)
    assert any(name.endswith("bias") for name in changes)
    assert integrated(given, plan).missing <= 0.0101


def test_patches_become_rows_and_columns() -> None:
    assert square(torch.arange(9.0)).tolist() == torch.arange(9.0).reshape(3, 3).tolist()  # type: ignore[union-attr]
    assert square(torch.arange(10.0)).tolist() == torch.arange(1.0, 10).reshape(3, 3).tolist()  # type: ignore[union-attr]
    assert square(torch.arange(7.0)) is None
    fine, coarse = torch.ones(4, 4), torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    both = together([coarse, fine, torch.ones(3, 3)])
    assert both[0, 0] == 2
    assert both[3, 3] == 3
    assert both[0, 3] == 1
    assert VISION == 1


def test_what_cannot_be_scored_is_a_sentence(given: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="also changes what layers read"):
        plan_changes(given.vlm.model, given.parts, Plan.uniform(given.parts, scheme("llm-int8", 8)))
    embedding = inspect(given.vlm, by="part", include=("embedding",))
    with pytest.raises(UserError, match="quantizes the embedding, whose rows are looked up"):
        plan_changes(given.vlm.model, embedding, Plan.uniform(embedding, scheme("rtn", 4)))
    worthless = {name: dict.fromkeys(given.schemes, float("nan")) for name in given.parts.names}
    monkeypatch.setitem(scoring.SCORES, "gram", lambda given: worthless)
    with pytest.raises(UserError, match="the gram score of vision at rtn:2 is NaN or infinite"):
        attribute(given, ["gram"])
