"""Grids, nearest rounding and the context manager: against plain per-element code, and bit for bit back again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vlms import llava
from torch import Tensor, nn

from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes, from_tensors, tensors
from sensitivity.models.discovery import discover
from sensitivity.quantize.layer.linears import Linears, Method, per_weight
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import GRANULARITIES, ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.spec.stored_bits import OVERHEAD


def grid(weight: Tensor) -> QuantizedWeight:
    """What rounding to nearest makes of a weight."""
    found = solve(Linears(("w",), (weight,)), [scheme("rtn", 4)])[0][0]
    assert isinstance(found, QuantizedWeight)
    return found


def weights(rows: int = 6, cols: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return llava().eval()


@pytest.fixture(scope="module")
def parts(model: nn.Module) -> ComponentMap:
    return discover(model)


# -- grids


def half(x: float) -> float:
    return torch.tensor(x).clamp(min=torch.finfo(torch.float16).tiny).half().float().item()


def plain_rtn(weight: Tensor, chosen: Scheme) -> Tensor:
    """One number after the other, as a textbook would."""
    rows, cols = weight.shape
    width = {"tensor": cols, "row": cols}.get(str(chosen.group)) or int(chosen.group)
    out = torch.empty_like(weight)
    top = 2**chosen.bits - 1
    for i, start in itertools.product(range(rows), range(0, cols, width)):
        values = weight.flatten().tolist() if chosen.group == "tensor" else weight[i, start : start + width].tolist()
        low, high = min(0.0, *values), max(0.0, *values)
        if chosen.symmetric and chosen.bits == 1:
            scale, zero = half(2 * sum(map(abs, values)) / len(values)), 0.5
        elif chosen.symmetric:
            scale, zero = half(2 * max(-low, high) / top), 2.0 ** (chosen.bits - 1)
        else:
            scale = half((high - low) / top)
            zero = min(max(round(-low / scale), 0), top)
        for j in range(start, min(start + width, cols)):
            code = min(max(round(weight[i, j].item() / scale + zero), 0), top)
            out[i, j] = (code - zero) * scale
    return out


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", ["tensor", "row", 8, 7, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nearest_is_what_a_loop_over_numbers_gives(bits: int, group: int | str, symmetric: bool) -> None:
    chosen = scheme("rtn", bits, group=group, symmetric=symmetric)
    torch.testing.assert_close(fake_quantize(weights(), chosen), plain_rtn(weights(), chosen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_is_the_papers_formula(bits: int) -> None:
    w = weights()
    low, span, levels = w.min(), w.max() - w.min(), 2**bits - 1
    expected = span * torch.round(levels * (w - low) / span) / levels + low
    found = fake_quantize(w, scheme("uniform", bits))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.unique().numel() <= 2**bits


@pytest.mark.parametrize("method", ["uniform", "rtn"])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_tensor_stays_what_it_is(method: str, value: float) -> None:
    w = torch.full((4, 8), value)
    # a symmetric grid ends half a step short of the largest magnitude on the positive side: 1/15 at four bits
    torch.testing.assert_close(fake_quantize(w, scheme(method, 4)), w, rtol=0.067, atol=1e-3)
    assert torch.equal(fake_quantize(w, scheme("uniform", 4)), w)


def test_a_group_as_wide_as_the_row_is_the_row() -> None:
    for symmetric in (True, False):
        per_row = fake_quantize(weights(), scheme("rtn", 3, symmetric=symmetric))
        assert torch.equal(fake_quantize(weights(), scheme("rtn", 3, group=20, symmetric=symmetric)), per_row)
        assert torch.equal(fake_quantize(weights(), scheme("rtn", 3, group=999, symmetric=symmetric)), per_row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_keep_their_type(dtype: torch.dtype) -> None:
    w = weights().to(dtype)
    for method, bits in (("uniform", 4), ("rtn", 4), ("nf4", 4), ("llm-int8", 8)):
        found = fake_quantize(w, scheme(method, bits))
        assert found.dtype == dtype
        assert (found - w).abs().max() < 0.6


# -- schemes


def test_a_scheme_holds_every_choice() -> None:
    chosen = scheme("gptq", 4, calibration={"calibration": "vqa", "examples": 128}, order="given")
    assert dict(chosen.settings) == {
        "damp": 0.01, "order": "given", "clip": True, "calibration": "vqa", "examples": 128,
    }  # fmt: skip
    assert scheme("rtn", 4, calibration={"calibration": "vqa"}).settings == ()
    assert Scheme.from_json(chosen.to_json()) == chosen


def test_presets_are_rows_of_settings() -> None:
    assert scheme("paper-gptq", 4) == scheme(
        "gptq", 4, group="row", symmetric=True, damp=0.01, order="given", clip=False
    )
    assert scheme("paper-awq", 3) == scheme("awq", 3, group=128, symmetric=False, exponents=20)
    assert scheme("paper-uniform", 3) == scheme("uniform", 3, biases=True)
    assert all(preset["method"] in METHODS for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scheme("gtpq", 4), "unknown method 'gtpq'; choose from .*did you mean gptq"),
        (lambda: scheme("rtn", 9), "rtn takes 1 to 8 bits, not 9"),
        (lambda: scheme("nf4", 3), "nf4 takes only 4 bits, not 3"),
        (lambda: scheme("uniform", 4, group=128), "uniform is always per tensor and asymmetric"),
        (lambda: scheme("gptq", 4, group="tensor"), "needs a scale per row or group"),
        (lambda: scheme("gptq", 4, dmap=0.1), "unknown setting of gptq 'dmap'.*did you mean damp"),
        (lambda: scheme("gptq", 4, order="best"), "unknown order of gptq 'best'; choose from given, activation"),
        (lambda: scheme("gptq", 4, damp="much"), "damp of gptq is a number from 0 to 10, not 'much'"),
        (lambda: scheme("gptq", 4, damp=-1.0), "damp of gptq is a number from 0 to 10, not -1.0"),
        (lambda: fake_quantize(weights(), Scheme("best", 4)), "unknown method 'best'"),
    ],
)
def test_a_wrong_wish_is_refused_in_one_sentence(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


def test_every_method_has_a_size(model: nn.Module, parts: ComponentMap) -> None:
    for name, row in METHODS.items():
        for bits in row.widths:
            assert size(parts, Plan.uniform(parts, scheme(name, bits))).bpw > bits


# -- the context manager


@pytest.mark.parametrize("by", GRANULARITIES)
def test_exactly_what_was_asked_for_changes(model: nn.Module, parts: ComponentMap, by: str) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    finer = parts.regroup(by)
    for component in finer.components[:: max(1, len(finer.components) // 6)]:
        plan = Plan.of(finer, {component.name: scheme("rtn", 2)})
        with quantized(model, finer, plan) as changed:
            assert changed == {weight.name for weight in component.weights}
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]) == (name not in changed), name
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])


def test_an_exception_inside_restores_every_bit(model: nn.Module, parts: ComponentMap) -> None:
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), quantized(model, parts, Plan.uniform(parts, scheme("llm-int8", 8))):
        raise ZeroDivisionError
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_biases_only_where_the_scheme_says_so(model: nn.Module, parts: ComponentMap) -> None:
    with quantized(model, parts, Plan.uniform(parts, scheme("paper-uniform", 3))) as changed:
        assert {w.bias for w in parts.weights if w.bias} < changed
    with quantized(model, parts, Plan.uniform(parts, scheme("uniform", 3))) as changed:
        assert changed == {w.name for w in parts.weights}


def test_a_weight_that_is_no_number_is_named(model: nn.Module, parts: ComponentMap) -> None:
    weight = parts.weights[5]
    parameter = model.get_parameter(weight.name)
    kept = parameter.data.clone()
    parameter.data[0, 0] = float("nan")
    try:
        with (
            pytest.raises(UserError, match=f"{weight.name} holds NaN"),
            quantized(model, parts, Plan.uniform(parts, scheme("rtn", 4))),
        ):
            pass
    finally:
        parameter.data.copy_(kept)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda w: None, r"the method own returned nothing for .*: only a constant weight may stay as it is"),
        (lambda w: w.clone(), r"the method own returned a Tensor for .*, and no stored weight"),
        (lambda w: "codes", r"the method own returned a str for .*, and no stored weight"),
        (lambda w: replace(grid(w), codes=grid(w).codes[:, 1:]), r"the method own made .* \(\d+, \d+\), and it is \("),
        (lambda w: replace(grid(w), scale=grid(w).scale * math.nan), r"the method own made .* NaN or infinite"),
    ],
    ids=["nothing", "tensor", "text", "shape", "nan"],
)
def test_what_a_method_of_ones_own_makes_is_looked_at(
    made: Callable[[Tensor], Any], said: str, model: nn.Module, parts: ComponentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a model that was never quantized would score like one that was, at the size of its codes."""
    monkeypatch.setitem(METHODS, "own", Method(per_weight(lambda w, s: made(w)), range(2, 9)))
    monkeypatch.setitem(OVERHEAD, "own", OVERHEAD["rtn"])
    plan = Plan.uniform(parts, Scheme("own", 4))
    with pytest.raises(UserError, match=said), quantized(model, parts, plan):
        pass


def test_memory_gives_the_same_bits(model: nn.Module, parts: ComponentMap) -> None:
    memory = WeightCodes()
    plan = Plan.uniform(parts, scheme("rtn", 3))
    name = parts.weights[0].name
    with quantized(model, parts, plan):
        alone = model.get_parameter(name).detach().clone()
    with quantized(model, parts, plan, memory):
        first = model.get_parameter(name).detach()
    with quantized(model, parts, plan, memory):
        again = model.get_parameter(name).detach()
    assert torch.equal(first, alone)
    assert again.data_ptr() == first.data_ptr()  # what did not change is not made again


@pytest.mark.parametrize("asked", ["rtn 3", "uniform 2", "nf4 4", "fp4 4", "llm-int8 8"])
def test_weights_are_remembered_as_codes_of_a_byte(asked: str, model: nn.Module, parts: ComponentMap) -> None:
    method, bits = asked.split()
    memory, plan = WeightCodes(), Plan.uniform(parts, scheme(method, int(bits)))
    with quantized(model, parts, plan) as changed:
        expected = {name: model.get_parameter(name).detach().clone() for name in changed}
    with quantized(model, parts, plan, memory):
        pass
    kept = WeightCodes()
    for key, value in memory.items():
        kept[key] = from_tensors(tensors(value))
        assert torch.equal(kept.dense(key, model.get_parameter(key[0])), expected[key[0]])
    assert memory.keys() == kept.keys()
    assert memory.bytes < 1.6 * sum(weight.numel() for weight in expected.values())  # small layers, many scales


def test_a_plan_that_changes_one_part_makes_numbers_of_that_part_alone(
    model: nn.Module, parts: ComponentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[QuantizedWeight] = []
    plainly = QuantizedWeight.dequantize
    monkeypatch.setattr(QuantizedWeight, "dequantize", lambda self: made.append(self) or plainly(self))
    memory, part = WeightCodes(), parts.components[-1]
    for bits in (3, 4):
        made.clear()
        plan = Plan.of(parts, {"*": scheme("rtn", 8), part.name: scheme("rtn", bits)})
        with quantized(model, parts, plan, memory):
            pass
    assert len(made) == len(part.weights)


def test_a_calibrated_method_asks_for_statistics(model: nn.Module, parts: ComponentMap) -> None:
    with (
        pytest.raises(UserError, match="gptq needs calibration data"),
        quantized(model, parts, Plan.uniform(parts, scheme("gptq", 4))),
    ):
        pass


def test_results_come_in_the_order_asked() -> None:
    from sensitivity.quantize.layer.linears import Linears

    schemes = [scheme("rtn", 8), scheme("uniform", 2), scheme("rtn", 2)]
    linears = Linears(("a", "b"), (weights(), weights(seed=1)))
    for chosen, results in zip(schemes, solve(linears, schemes), strict=True):
        for weight, result in zip(linears.weights, results, strict=True):
            assert result is not None
            assert torch.equal(result.dequantize(), fake_quantize(weight, chosen))
