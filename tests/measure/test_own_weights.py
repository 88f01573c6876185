"""A model's own weights while a plan's stand in their place: half the memory where no bit is lost; all bits return."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory import own_weights
from sensitivity.measure.memory.own_weights import OwnWeights
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan


@pytest.fixture(autouse=True)
def _small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_weights, "MIN_SIZE", 1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def layer(values: Tensor) -> nn.Module:
    model = nn.Linear(values.shape[1], values.shape[0], bias=False)
    model.weight.data = values
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_stored_in_16_bits_is_kept_in_16(dtype: torch.dtype) -> None:
    values = torch.randn(40, 7).to(dtype).float()
    values[0, :3] = torch.tensor([0.0, -0.0, torch.inf])
    own = OwnWeights(layer(values))
    own.narrow("weight")
    assert own._kept["weight"].dtype == dtype
    assert torch.equal(bits(own["weight"]), bits(values))


@pytest.mark.parametrize("place", [0, 20, 39])
@pytest.mark.parametrize("other", [1 / 3, torch.nan])
def test_one_number_that_would_change_keeps_all_bits(place: int, other: float) -> None:
    values = torch.randn(40, 7).bfloat16().float()
    values[place, 3] = other
    own = OwnWeights(layer(values))
    own.narrow("weight")
    assert own._kept["weight"] is values or own._kept["weight"].data_ptr() == values.data_ptr()


def test_a_model_of_16_bits_is_left_alone() -> None:
    model = layer(torch.randn(40, 7)).bfloat16()
    own = OwnWeights(model)
    own.narrow("weight")
    assert own["weight"].data_ptr() == model.get_parameter("weight").data_ptr()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load("embedded:scenes-llava").model


@pytest.fixture(scope="module")
def parts() -> ComponentMap:
    return inspect(load("embedded:scenes-llava"), by="part")


def test_a_plan_is_taken_out_bit_for_bit_again_and_again(
    model: nn.Module, parts: ComponentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[OwnWeights] = []
    narrow = OwnWeights.narrow
    monkeypatch.setattr(OwnWeights, "narrow", lambda self, name: (kept.append(self), narrow(self, name))[1])
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    memory = WeightCodes(0)
    for width in (3, 4, 3):
        with quantized(model, parts, Plan.uniform(parts, scheme("rtn", width)), memory) as changed:
            sizes = {kept[-1]._kept[name].element_size() for name in changed}
            assert sizes == {2}  # the embedded model is stored in 16 bits
        for name, parameter in model.named_parameters():
            assert torch.equal(bits(parameter.data), bits(before[name])), name


def test_dense_weights_are_kept_up_to_the_limit(model: nn.Module, parts: ComponentMap) -> None:
    plan = Plan.uniform(parts, scheme("rtn", 4))
    sizes = [4 * model.get_parameter(weight.name).numel() for weight in parts.weights]
    for limit, count in ((0, 0), (sizes[0], 1), (sum(sizes[:3]), 3), (sum(sizes), len(sizes))):
        memory = WeightCodes()
        with quantized(model, parts, plan, memory) as changed:
            assert len(memory._dense) == len(changed)
            memory.limit = memory.bytes + limit
        assert len(memory._dense) == count


def test_calibration_does_not_keep_the_weights_that_a_plan_replaces() -> None:
    """Whatever else held them, such as statistics for gradients, they would be in memory in both widths."""
    vlm = load("embedded:scenes-llava")
    parts = inspect(vlm, by="part")
    (chosen,), statistics = with_calibration(vlm, parts, [scheme("gptq", 4)], ["vqa"], n=4, cache_gb=0)
    name = next(weight.name for weight in parts.components[-1].weights)
    was = weakref.ref(vlm.model.get_parameter(name).data.untyped_storage())
    assert was() is not None  # the storage, and not only its wrapper, is what is watched
    with quantized(vlm.model, parts, Plan.uniform(parts, chosen), WeightCodes(0), statistics):
        gc.collect()
        assert was() is None


def test_what_goes_back_into_the_model_is_kept_nowhere_else() -> None:
    own = OwnWeights(layer(torch.randn(40, 7).bfloat16().float()))
    own.narrow("weight")
    kept = weakref.ref(own._kept["weight"].untyped_storage())
    back = own.take("weight")
    assert kept() is None
    assert back.dtype == torch.float32
    assert len(own) == 0
