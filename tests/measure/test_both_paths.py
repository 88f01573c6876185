"""Calibration on both paths: float inputs beside quantized ones, as two whole passes give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.calibrate.calibration import calibration_examples, calibration_statistics
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.token_batches import VISION, answer_batches, calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme

N = 4


@pytest.fixture(scope="module")
def parts(scenes_llava: VLM) -> ComponentMap:
    return inspect(scenes_llava, by="part")


@pytest.fixture(scope="module")
def statistics(scenes_llava: VLM, parts: ComponentMap) -> Statistics:
    return calibration_statistics(scenes_llava, parts, ["vqa"], N, path="both", importance=["block"])


def read(vlm: VLM, weights: Sequence[Weight]) -> tuple[dict[str, Tensor], Tensor]:
    """What layers read of the calibration data in plain passes, and which tokens of the last are of the image."""
    found: dict[str, list[Tensor]] = {}
    image: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for shared, weight in {input_of(weight): weight for weight in weights}.items():

            def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = shared) -> None:
                found.setdefault(name, []).append(args[0].flatten(0, -2).double())

            hooks.callback(vlm.model.get_submodule(weight.reader).register_forward_pre_hook(hook).remove)
        for batch in answer_batches(vlm, calibration_examples(["vqa"], N, 0)):
            calibration_pass(vlm, batch)
            modality, _ = batch.modality("language", found[input_of(weights[-1])][-1].shape[:1])
            assert modality is not None
            image.append(modality == VISION)
    return {name: torch.cat(values) for name, values in found.items()}, torch.cat(image)


def test_sums_are_those_of_two_whole_passes(scenes_llava: VLM, parts: ComponentMap, statistics: Statistics) -> None:
    """Behind a vision tower with weights and inputs in 8 and fewer bits, whose hooks must not touch the float pass."""
    plan = Plan.of(parts, {"vision": scheme("rtn", 2), "connector": scheme("llm-int8", 8)})
    weights = [w for w in parts["language"].weights if w.block == 1 and w.kind == "ff"]
    floats, _ = read(scenes_llava, weights)
    installed = [(w.name, one) for name, one in plan.schemes if one for w in parts[name].weights]
    with quantized(scenes_llava.model, parts, plan):
        behind, image = read(scenes_llava, weights)
        found = statistics.gather(weights, tuple(installed))
    for name, curvature in found.items():
        assert curvature.paths is not None
        x, other = behind[name], floats[name]
        assert not torch.allclose(x, other)
        torch.testing.assert_close(curvature.gram.double(), x.T @ x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(curvature.paths.cross.double(), (other - x).T @ x, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(curvature.paths.image.double(), x[image].square().sum(0), rtol=1e-3, atol=1e-3)


def test_before_anything_is_quantized_the_paths_are_one(
    scenes_llava: VLM, parts: ComponentMap, statistics: Statistics
) -> None:
    weights = [w for w in parts["vision"].weights if w.block == 0]
    for gather in (statistics.gather, statistics.weighted["block"]):
        for curvature in gather(weights, ()).values():
            assert curvature.paths is not None
            assert not curvature.paths.cross.any()
    exposed = calibration_statistics(scenes_llava, parts, ["vqa"], N, path="exposed")
    for name, curvature in exposed.gather(weights, ()).items():
        assert torch.equal(curvature.gram, statistics.gather(weights, ())[name].gram)


def plans(parts: ComponentMap, facts: Mapping[str, object]) -> list[Plan]:
    def one(name: str, bits: int) -> Scheme:
        return scheme(name, bits, calibration=facts)  # type: ignore[arg-type]

    mixed = {"vision": one("salq-vlm", 3), "connector": scheme("llm-int8", 8), "language": one("vlm-ptq", 3)}
    return [Plan.of(parts, mixed)]


def test_the_fast_path_answers_as_the_plain_one(
    scenes_llava: VLM, parts: ComponentMap, statistics: Statistics, tmp_path: Path
) -> None:
    chosen = plans(parts, statistics.facts)
    fast, plain = (
        sweep(scenes_llava, parts, chosen, ["vqa"], tmp_path / how, n=4, statistics=statistics, plain=how == "plain")
        for how in ("fast", "plain")
    )
    for plan in chosen:
        first, second = (study.examples(plan) for study in (fast, plain))
        assert first is not None
        assert second is not None
        assert first.set_index("example")["score"].equals(second.set_index("example")["score"])
    # the same statistics, and targets of their own
    assert fast.table()["vqa.nll"].nunique() == len(chosen) + 1


def test_a_layer_whose_inputs_did_not_change_is_that_of_gptq(
    scenes_llava: VLM, parts: ComponentMap, statistics: Statistics
) -> None:
    finest = parts.regroup("linear")
    name = next(w.module for w in parts["vision"].weights if w.block == 0)
    found = []
    for method in ("gptq", "gptaq", "salq-vlm"):
        plan = Plan.of(finest, {name: scheme(method, 3, calibration=statistics.facts)})
        with quantized(scenes_llava.model, finest, plan, statistics=statistics) as (only, *_):
            found.append(scenes_llava.model.get_parameter(only).detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_path_is_chosen_by_what_needs_it(scenes_llava: VLM, parts: ComponentMap) -> None:
    both, _ = with_calibration(scenes_llava, parts, [scheme("gptq", 3), scheme("gptaq", 3)], ["vqa"], n=N, cache_gb=0)
    assert {one["path"] for one in both} == {"both"}
    message = "gptq with shift=later compares inputs behind .* the calibration path is float; type --path both"
    with pytest.raises(UserError, match=message):
        with_calibration(scenes_llava, parts, [scheme("gptaq", 3)], ["vqa"], n=N, path="float")
