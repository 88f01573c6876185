"""Attributions: scores as their formulas say, and a path integral whose terms are the whole change of the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from few import few
from torch import Tensor

from sensitivity.measure.attribution import scores as scoring
from sensitivity.measure.attribution import weight_errors
from sensitivity.measure.attribution.blame import Blame, blame_of, patch_grid, summed_grids
from sensitivity.measure.attribution.boxes import NUMBERS, mean_shifts, tokens_of, writes_boxes
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.checks import check_scores
from sensitivity.measure.attribution.coverage import coverage_of_shares
from sensitivity.measure.attribution.scores import SCORES, attribute
from sensitivity.measure.attribution.weight_errors import WeightErrors, plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples, calibration_statistics
from sensitivity.measure.gradients.backward import answer_loss, backward_pass
from sensitivity.measure.gradients.path_integral import PathIntegral, integrate_path
from sensitivity.measure.install.plan_in_model import prepare, quantized
from sensitivity.measure.passes.token_batches import VISION, TokenBatch, answer_batches
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec import stage
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.scoring.boxes import parse

FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]
BITS = (2, 4)


def calibrated(vlm: VLM, by: str = "part", n: int = 4) -> Calibrated:
    parts = inspect(vlm, by=by)
    data = calibration_examples(["vqa"], n, 0)
    schemes = [scheme("rtn", bits) for bits in BITS]
    return Calibrated(
        vlm,
        parts,
        schemes,
        calibration_statistics(vlm, parts, ["vqa"], n),
        lambda rows: answer_batches(vlm, data, rows),
    )


@pytest.fixture(scope="module")
def given(scenes_llava: VLM) -> Calibrated:
    return calibrated(scenes_llava, n=2)


def layers(given: Calibrated) -> dict[str, list[tuple[Tensor, Tensor, TokenBatch]]]:
    """What each layer reads, the gradient of what it returns, and the batch: all kept in memory."""
    found: dict[str, list[tuple[Tensor, Tensor, TokenBatch]]] = {}
    for batch in given.data(1):

        def visit(weight: Weight, inputs: Tensor, gradient: Tensor, batch: TokenBatch = batch) -> None:
            found.setdefault(weight.name, []).append((inputs, gradient, batch))

        backward_pass(given.vlm, given.weights, batch, visit)
    return found


def test_scores_are_their_formulas(given: Calibrated) -> None:
    """Each layer by itself, from its inputs and gradients; the sums over a component are the scores."""
    found = {one.name: one for one in attribute(given, ["weight", "gram", "kfac", "swing", "fisher", "change"])}
    seen = layers(given)
    # of a part under a scheme: for each layer, what it adds to the variance of each example's loss
    variances: dict[tuple[str, int], list[Tensor]] = {}
    expected = {name: {part: [0.0] * len(BITS) for part in given.parts.names} for name in found}
    plans = [Plan.uniform(given.parts, chosen) for chosen in given.schemes]
    changes = [plan_changes(given.vlm.model, given.parts, plan) for plan in plans]
    for weight in given.weights:
        own = given.vlm.model.get_parameter(weight.name).detach().float()
        for i in range(len(given.schemes)):
            error = changes[i][weight.name].float()
            expected["weight"][weight.part][i] += float(error.norm() ** 2 / own.norm() ** 2)
            if weight.name not in seen:
                continue
            inputs = torch.cat([read for read, _, _ in seen[weight.name]]).float()
            expected["gram"][weight.part][i] += float((inputs @ error.T).norm() ** 2 / (inputs @ own.T).norm() ** 2)
            squares = torch.cat([gradient for _, gradient, _ in seen[weight.name]]).float().square().mean(0)
            form = (inputs @ error.T).square().mean(0)  # of each row, over the tokens of all examples
            expected["kfac"][weight.part][i] += float((form * squares).sum()) * len(inputs)
            each = torch.stack([gradient.float().square().sum(0) for _, gradient, _ in seen[weight.name]])
            variances.setdefault((weight.part, i), []).append(each @ form)
            for read, gradient, _ in seen[weight.name]:  # one example in each batch
                products = (read.float() @ error.T) * gradient
                expected["fisher"][weight.part][i] += float(products.square().sum())
                expected["change"][weight.part][i] += abs(float(products.sum()))
    for (part, i), of_layers in variances.items():
        expected["swing"][part][i] = float(sum(of_layers).sqrt().sum())
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
    return integrate_path(given.vlm, given.parts, changes, lambda: given.data(4), **how)


@pytest.mark.parametrize("bits", few([2, 3, 6], [2]))
def test_the_terms_sum_to_the_whole_change(given: Calibrated, bits: int) -> None:
    before = {name: p.detach().clone() for name, p in given.vlm.model.named_parameters()}
    found = integrated(given, Plan.uniform(given.parts, scheme("rtn", bits)))
    assert found.missing <= 0.0101
    assert found.passes >= 2
    assert all(torch.equal(before[name], p) for name, p in given.vlm.model.named_parameters())
    told = blame_of(given.parts, given.vlm.family, found)
    for table in (told.components, told.modalities):
        assert sum(table.values()) == pytest.approx(found.total)
    assert set(told.modalities) == {"vision", "prompt", "answer"}
    by_token = sum(float(values.sum()) for values in told.prompts.values())
    assert by_token == pytest.approx(told.modalities["prompt"])
    assert {len(values) for values in told.prompts.values()} == {len(ids) for ids in found.prompts.values()}


def test_passes_are_bounded_and_shown_as_they_go(given: Calibrated) -> None:
    seen: list[str] = []

    def watched() -> Iterable[TokenBatch]:
        seen.append(stage.now())
        return given.data(4)

    changes = plan_changes(given.vlm.model, given.parts, Plan.uniform(given.parts, given.schemes[0]), given.statistics)
    found = integrate_path(given.vlm, given.parts, changes, watched, 0.0, 6, name="loss of x")
    assert found.passes == 6
    assert len(seen) == 6 + 3  # and the loss at both ends and in the middle
    shown = [line for line in seen if "of at most 6 backward passes" in line]
    assert shown[0] == "loss of x: 0 of at most 6 backward passes"
    assert "loss of x: 5 of at most 6 backward passes" in shown[-1]
    assert stage.now() == ""


def test_too_few_steps_are_not_enough_at_two_bits(given: Calibrated) -> None:
    """Why the path is followed until the terms sum up: one piece of it misses the change by far."""
    coarse = integrated(given, Plan.uniform(given.parts, given.schemes[0]), max_passes=2)
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
    return blame_of(given.parts, given.vlm.family, integrated(given, plan))


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
    assert patch_grid(torch.arange(9.0)).tolist() == torch.arange(9.0).reshape(3, 3).tolist()  # type: ignore[union-attr]
    assert patch_grid(torch.arange(10.0)).tolist() == torch.arange(1.0, 10).reshape(3, 3).tolist()  # type: ignore[union-attr]
    assert patch_grid(torch.arange(7.0)) is None
    fine, coarse = torch.ones(4, 4), torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    both = summed_grids([coarse, fine, torch.ones(3, 3)])
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


@pytest.mark.parametrize("names", [["change", "swing"], ["gram", "fisher", "kfac"], ["swing", "gram"]])
def test_scores_that_are_asked_for_together_quantize_each_weight_once(
    given: Calibrated, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_codes = replace(given)
    few_codes.__dict__["errors"] = WeightErrors(given.vlm.model, given.parts, given.schemes, given.statistics, limit=0)
    named: list[str] = []

    def counted(model: Any, blocks: Any, plans: list[Plan], *more: Any) -> None:
        named.extend(name for name, choice in plans[0].schemes if choice is not None)
        prepare(model, blocks, plans, *more)

    monkeypatch.setattr(weight_errors, "prepare", counted)
    found = attribute(few_codes, names)
    assert sorted(named) == sorted(given.parts.regroup("block").names)
    for whole, one in zip(attribute(given, names), found, strict=True):
        assert one.seconds > few_codes.seconds["layers"] * (one.name not in ("change", "fisher"))
        for part, row in whole.scores.items():
            assert list(one.scores[part].values()) == pytest.approx(list(row.values()), rel=1e-5), (one.name, part)


def test_a_block_at_a_time_gives_the_same_scores(given: Calibrated) -> None:
    """Codes of a large model do not fit into memory at all widths: few are held, and nothing differs."""
    few_codes = replace(given)
    few_codes.__dict__["errors"] = WeightErrors(given.vlm.model, given.parts, given.schemes, given.statistics, limit=0)
    names = ["weight", "gram", "kfac", "swing", "fisher"]
    for whole, one in zip(attribute(given, names), attribute(few_codes, names), strict=True):
        for part, row in whole.scores.items():
            assert list(one.scores[part].values()) == pytest.approx(list(row.values()), rel=1e-5), (one.name, part)
    assert len(few_codes.errors.groups) == len(given.parts.regroup("block").names)
    assert len(given.errors.groups) == 1
    assert few_codes.errors.held is None, "the last group's codes are freed"
    first = next(few_codes.errors.by_group())
    few_codes.errors.of(first[0])
    held = few_codes.errors.held
    assert held is not None
    assert {key[0] for key in held[1]} == {weight.name for weight in first}


def test_one_component_at_a_time_is_really_run(given: Calibrated) -> None:
    found = {one.name: one.scores for one in attribute(given, ["kl", "loss", "higgs", "weight"])}
    chosen, batches_ = given.schemes[0], list(given.data(4))
    before = sum(float(answer_loss(given.vlm, batch)) for batch in batches_)
    with quantized(given.vlm.model, given.parts, Plan.of(given.parts, {"vision": chosen})):
        after = sum(float(answer_loss(given.vlm, batch)) for batch in batches_)
    assert found["loss"]["vision"][chosen] == pytest.approx(after - before, rel=1e-4)
    assert all(value > 0 for row in found["kl"].values() for value in row.values())
    for part in given.parts.names:  # the same divergence per noise, at whatever error the scheme has
        damages, errors = found["higgs"][part], found["weight"][part]
        ratios = [damages[one] / errors[one] for one in given.schemes]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
        assert ratios[0] > 0


def test_what_components_cover_is_found_again() -> None:
    """Shares of a damage that is 1 - prod (1 - a), by a fine sum along the way, give the a that they came from."""
    truth = np.array([0.7, 0.02, 0.4, 0.0])
    t = (np.arange(200_000) + 0.5) / 200_000
    left = 1 - t[:, None] * truth
    shares = (truth * left.prod(1, keepdims=True) / left).mean(0)
    assert coverage_of_shares(list(shares)) == pytest.approx(truth, abs=1e-6)
    assert sum(shares) == pytest.approx(1 - np.prod(1 - truth), abs=1e-9)
    assert max(coverage_of_shares([5.0, 0.1])) < 1  # more than can be lost


def test_a_score_is_checked_by_plans_that_are_run(given: Calibrated) -> None:
    scores = attribute(given, ["weight", "kl"])
    found = check_scores(given, scores, 6)
    assert found.pass_seconds > 0
    assert found.by_score["weight"].error is None  # it foretells an order, and no number
    assert found.by_score["kl"].plans == 6
    assert 0 < (found.by_score["kl"].error or 0) < 1
    assert (found.by_score["kl"].rank_correlation or 0) > 0
    assert check_scores(given, scores, 0).by_score == {}


def test_tokens_of_a_box_are_those_of_its_numbers(scenes_llava: VLM) -> None:
    """The losses of all numbers and of what stands between them are the whole loss; each number is its own token."""
    (task,) = calibration_examples(["ground"], 3, 0)
    assert writes_boxes([task])
    assert not writes_boxes(calibration_examples(["vqa"], 3, 0))
    tokenizer = scenes_llava.processor.tokenizer
    for batch in answer_batches(scenes_llava, [task], 1):
        assert batch.targets is not None
        masks = [tokens_of(scenes_llava, number, batch.targets) for number in range(len(NUMBERS))]
        right = [f"<{value:.0f}>" for value in parse(task.examples[batch.examples[0]].answers[0])[0]]
        assert [tokenizer.decode(batch.targets[mask == 1]).strip() for mask in masks] == right
        rest = 1 - torch.stack(masks).sum(0)
        each = [float(answer_loss(scenes_llava, batch, lambda _, one=one: one)) for one in (*masks, rest)]
        assert sum(each) == pytest.approx(float(answer_loss(scenes_llava, batch)), rel=1e-9)
    before, after = "{<0><0><8><8>|<0>}", "{<4><0><8><20>|<15>}"
    distances = mean_shifts({"a": before, "b": "none", "c": before}, {"a": after, "b": before, "c": "{<0>"})
    assert distances == dict(zip(NUMBERS, (4, 0, 0, 12, 15), strict=True))
    assert mean_shifts({}, {}) == {}
