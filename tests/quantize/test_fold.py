"""Folding scales: outputs stay what they were in every family, and a folded model equals the unfolded one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fed_vlms import FAMILIES, built, fed
from torch import Tensor, nn

from sensitivity.measure.calibrate.absorbers import Absorber, absorbers_of
from sensitivity.measure.calibrate.collecting import collect
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.fold import fold_scales
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size


def output(vlm: VLM, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        found = vlm.model(**batch.inputs)
    logits = getattr(found, "logits", None)
    return logits if logits is not None else found.logits_per_image


def folds(vlm: VLM, parts: ComponentMap, batch: TokenBatch) -> dict[str, Absorber]:
    return absorbers_of(vlm.model, parts, lambda: calibration_pass(vlm, batch))


def randomized(vlm: VLM) -> VLM:
    """Norms that do something, and biases that are not zero: a fold that forgot either would show."""
    g = torch.Generator().manual_seed(5)
    for name, parameter in vlm.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data = parameter.data + 0.5 * torch.randn(parameter.shape, generator=g)
    return vlm


@pytest.mark.parametrize("name", FAMILIES)
def test_unrounded_scales_leave_the_output_unchanged(name: str) -> None:
    """Invariant 5 of the transforms: at full precision, through norms, biases, attention and gates."""
    vlm = randomized(built(name))
    parts, batch = inspect(vlm), fed(name, vlm)
    into, before = folds(vlm, parts, batch), output(vlm, batch)
    assert into
    g = torch.Generator().manual_seed(1)
    scales = {shared: torch.rand(width(parts, shared), generator=g) * 3 + 0.3 for shared in into}
    results: dict[str, Any] = {}
    for weight in parts.weights:  # codes that are the weights themselves: nothing is rounded
        own = vlm.model.get_parameter(weight.name).data.clone()
        scale = scales.get(input_of(weight))
        codes = own if scale is None else own * scale
        results[weight.name] = QuantizedWeight(codes, torch.ones(len(own), 1), torch.zeros(1, 1), own.shape[1], scale)
    folded = fold_scales(vlm.model, results, {w.name: input_of(w) for w in parts.weights}, into)
    changed = 0
    for name_, result in folded.items():
        changed += not torch.equal(vlm.model.get_parameter(name_), result.dequantize())
        vlm.model.get_parameter(name_).data = result.dequantize()
    assert changed > len(into) / 2
    torch.testing.assert_close(output(vlm, batch), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def width(parts: ComponentMap, shared: str) -> int:
    return next(w.cols for w in parts.weights if input_of(w) == shared)


def test_what_absorbs_what() -> None:
    vlm = built("llava")
    into = folds(vlm, inspect(vlm), fed("llava", vlm))
    vision, language = "model.vision_tower.encoder.layers.0.", "model.language_model.layers.0."
    assert into[vision + "self_attn"] == Absorber(vision + "layer_norm1", True)
    assert into[vision + "self_attn.out_proj"] == Absorber(vision + "self_attn.v_proj", False)
    assert into[vision + "mlp.fc1"] == Absorber(vision + "layer_norm2", True)
    assert into[language + "mlp"] == Absorber(language + "post_attention_layernorm", True)
    assert into[language + "mlp.down_proj"] == Absorber(language + "mlp.up_proj", False)
    assert vision + "mlp.fc2" not in into  # never across a GELU
    assert "model.multi_modal_projector.linear_2" not in into
    assert language + "self_attn.o_proj" not in into  # two query heads share one value head: shapes do not allow it


def test_norms_on_the_residual_stream_do_not_qualify() -> None:
    vlm = built("blip2_opt")
    parts = inspect(vlm)
    into = folds(vlm, parts, fed("blip2_opt", vlm))
    assert not [shared for shared in into if shared.startswith("qformer.") and into[shared].norm]
    assert "language_model.model.decoder.layers.0.self_attn" in into
    assert "vision_model.encoder.layers.0.self_attn.qkv" in into


@pytest.mark.parametrize("name", ["llava", "blip2_opt", "paligemma"])
def test_a_folded_model_equals_the_unfolded_one(name: str) -> None:
    vlm = randomized(built(name))
    parts, batch = inspect(vlm, by="part"), fed(name, vlm)
    found = collect(vlm, parts.weights, [batch])
    facts = {"path": "float"}
    statistics = Statistics(
        facts,
        lambda weights, done=None: {input_of(w): found[input_of(w)] for w in weights},
        lambda: folds(vlm, parts, batch),
    )
    chosen = scheme("awq", 4, group=16, calibration=facts, scales="folded")
    with quantized(vlm.model, parts, Plan.uniform(parts, chosen), statistics=statistics):
        unfolded = output(vlm, batch)
    results: dict[str, QuantizedWeight] = {}
    inputs = {w.name: input_of(w) for w in parts.weights}
    for shared in dict.fromkeys(inputs.values()):
        names = tuple(n for n, of in inputs.items() if of == shared)
        weights = tuple(vlm.model.get_parameter(n) for n in names)
        linears = Linears(names, weights, found[shared], shared in statistics.absorbers)
        results.update(zip(names, solve(linears, [chosen])[0], strict=True))  # type: ignore[arg-type]
    scaled = {inputs[n] for n, result in results.items() if result.inputs is not None}
    assert scaled
    assert scaled <= set(statistics.absorbers)
    own = copy.deepcopy(vlm.model.state_dict())
    for name_, result in fold_scales(vlm.model, results, inputs, statistics.absorbers).items():
        assert result.inputs is None
        assert torch.equal(result.codes, results[name_].codes)
        vlm.model.get_parameter(name_).data = result.dequantize()
    torch.testing.assert_close(output(vlm, batch), unfolded, rtol=1e-3, atol=1e-4 * float(unfolded.abs().max()))
    vlm.model.load_state_dict(own)


def test_folded_scales_weigh_nothing() -> None:
    parts = inspect(built("llava"), by="part")
    stored, folded = (
        size(parts, Plan.uniform(parts, scheme("awq", 4, scales=how))).bits for how in ("stored", "folded")
    )
    assert stored - folded == 16 * sum(w.cols for w in parts.weights)


def test_a_scale_that_nothing_absorbs_is_an_error() -> None:
    result = QuantizedWeight(torch.ones(2, 4), torch.ones(2, 1), torch.zeros(1, 1), 4, torch.full((4,), 2.0))
    with pytest.raises(
        UserError, match="nothing before fc2 can absorb its scales; make the scheme with scales='folded'"
    ):
        fold_scales(nn.Sequential(), {"fc2": result}, {"fc2": "fc2"}, {})


def test_a_norm_that_ignores_its_weight_is_refused() -> None:
    class Stubborn(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleDict({"norm": Stubborn(4), "fc": nn.Linear(4, 2)})
    result = QuantizedWeight(torch.ones(2, 4), torch.ones(2, 1), torch.zeros(1, 1), 4, torch.full((4,), 2.0))
    with pytest.raises(UserError, match="Stubborn is not proportional to its weight"):
        fold_scales(model, {"fc.weight": result}, {"fc.weight": "fc"}, {"fc": Absorber("norm", True)})
