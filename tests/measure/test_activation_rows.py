"""Published ways to round activations: sign folds, adaptive grids, matched attention, filtered data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from few import few
from torch import Tensor, nn

from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.activations.adaptive_softmax import LARGEST_SHARES, LEVELS_PER_HALVING, adaptive_grids
from sensitivity.measure.activations.attention_operands import is_operand, operand_grids, signs_of, two_peaks
from sensitivity.measure.activations.matching import AttentionScale, attention_scales, factors
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.gradients.token_importance import TokenNumbers, by_filter
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.install.rounding import rounding_hooks
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.attention_hooks import attention_modules, probability_hooks
from sensitivity.measure.passes.token_batches import answer_batches as token_batches
from sensitivity.measure.passes.token_batches import calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.run_time.inputs import round_between
from sensitivity.quantize.run_time.probabilities import round_probabilities
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.stored.rotated import InputTransform
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task

ROWS = ("repq-vit", "ptq4sam", "quantvggt", "quantvla")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(vlm: VLM) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(calibration_pass(vlm, next(token_batches(vlm, [task("vqa", n=3)]))).logits)


@pytest.mark.parametrize("name", few(ROWS, ["repq-vit", "ptq4sam"]))
def test_a_row_runs_in_every_part_and_leaves_the_model_as_it_was(scenes_llava: VLM, name: str) -> None:
    """The same bits with a memory and without; at 8 bits nearer to full precision than at 3."""
    parts, before = inspect(scenes_llava, by="part"), logits(scenes_llava)
    less = {"learned": 1} if name == "quantvggt" else {}
    asked = [scheme(name, bits, activations=bits, **less) for bits in (3, 8)]
    schemes, statistics = with_calibration(scenes_llava, parts, asked, ["vqa"], n=2, cache_gb=0)
    found = []
    for chosen, memory in ((schemes[0], WeightCodes()), (schemes[0], None), (schemes[1], None)):
        with quantized(scenes_llava.model, parts, Plan.uniform(parts, chosen), memory, statistics):
            found.append(logits(scenes_llava))
    assert torch.equal(found[0], found[1])
    assert torch.equal(logits(scenes_llava), before)
    errors = [float((one - before).square().mean()) for one in found[1:]]
    assert errors[0] > 4 * errors[1] > 0


@pytest.mark.parametrize("transform", ["none", "hadamard", "blocks"])
def test_transforms_without_rounding_leave_the_logits(scenes_llava: VLM, transform: str) -> None:
    """Every input goes through the transform of a stored weight and back."""
    parts, before = inspect(scenes_llava, by="part"), logits(scenes_llava)
    asked = scheme("smooth", 8, transform=transform, activations=8)
    (chosen,), statistics = with_calibration(scenes_llava, parts, [asked], ["vqa"], n=2, cache_gb=0)
    memory, plan = WeightCodes(), Plan.uniform(parts, chosen)
    with quantized(scenes_llava.model, parts, plan, memory, statistics):
        pass
    stored = {key[0]: value for key, value in memory.items()}
    handles = []
    for weight in parts.weights:
        transformed = InputTransform.of(stored[weight.name], torch.device("cpu"))
        assert transformed is not None
        handles += rounding_hooks(scenes_llava.model, weight, chosen, transformed, lambda x: x)
    assert torch.allclose(logits(scenes_llava), before, atol=2e-3)
    for handle in handles:
        handle.remove()


class Attention(nn.Module):
    """One attention over four heads, as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        def heads(layer: nn.Module) -> Tensor:
            return torch.as_tensor(layer(x)).unflatten(-1, (4, 4)).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(*map(heads, (self.q_proj, self.k_proj, self.v_proj)))
        return torch.as_tensor(self.o_proj(mixed.transpose(1, 2).flatten(2)))


@pytest.fixture
def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Attention()}).requires_grad_(False)


def passes_of(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    for x in inputs:
        model["a"](x)  # type: ignore[index]
        yield


def test_the_adaptive_grid_is_the_best_of_an_exhaustive_search(attention: nn.Module) -> None:
    data = [numbers(2, 6, 16, seed=i).mul(4) for i in range(2)]
    found = adaptive_grids(attention, {"a": [2, 4]}, lambda: passes_of(attention, *data))
    layers = attention["a"]  # type: ignore[index]
    triples = []
    for x in data:
        query, key, value = (
            layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (layers.q_proj, layers.k_proj, layers.v_proj)
        )
        triples.append(((query @ key.mT / 2).softmax(-1), value))
    largest = max(float(p.max()) for p, _ in triples)
    for bits in (2, 4):
        errors = {
            (halving, largest * reach): sum(
                float(((round_probabilities(p, bits, halving, largest * reach) @ v) - p @ v).square().sum())
                for p, v in triples
            )
            for halving in LEVELS_PER_HALVING
            for reach in LARGEST_SHARES
        }
        best = min(errors, key=lambda grid: errors[grid])
        assert errors[found["a", bits]] == pytest.approx(errors[best], rel=1e-4)
        # so it is no worse than the two fixed grids at the same reach
        assert errors[best] <= min(errors[1, largest], errors[2, largest])


def test_signs_fold_two_peaks_and_leave_every_product() -> None:
    means = torch.tensor([3.0, -3.0, 3.0, -3.0, 0.0])
    keys, queries = numbers(400, 5, seed=1) * 0.5 + means, numbers(400, 5, seed=2)
    assert two_peaks(keys[:, :4].flatten())
    assert not two_peaks(numbers(2000))
    assert not two_peaks(torch.ones(50))
    signs = signs_of(means, keys[:, :4].flatten())
    assert signs.tolist() == [1, -1, 1, -1, 1]  # a mean of zero keeps its channel
    assert torch.allclose((queries * signs) @ (keys * signs).T, queries @ keys.T, atol=1e-4)
    assert signs_of(means, numbers(2000)).tolist() == [1] * 5  # one peak: nothing to fold
    folded = keys[:, :4] * signs[:4]
    errors = [
        (round_between(values, 4, values.min().clamp(max=0), values.max().clamp(min=0)) - values).square().mean()
        for values in (folded, keys[:, :4])
    ]
    assert errors[0] < errors[1] / 2  # half the range


def test_operands_of_a_model_have_one_range_each(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=2)
    weights = [weight for weight in parts.weights if is_operand(weight)]
    assert len(weights) == 3 * sum(len({w.block for w in parts[part].weights}) for part in ("vision", "language"))
    found = operand_grids(scenes_llava.model, weights, "tensor", statistics.passes)
    for grid in found.values():
        assert len(grid.low.unique()) == len(grid.high.unique()) == 1
        assert bool((grid.signs == 1).all())
        assert float(grid.low[0]) <= 0 <= float(grid.high[0])
    # a planted bias: half of the channels of one layer's keys far below zero, and half far above
    key = next(weight for weight in weights if weight.module.endswith("vision_model.encoder.layers.0.self_attn.k_proj")
               or (weight.part == "vision" and weight.block == 0 and weight.module.endswith("k_proj")))  # fmt: skip
    bias = scenes_llava.model.get_submodule(key.module).bias
    own = bias.data.clone()
    try:
        bias.data = torch.where(torch.arange(len(own)) % 2 == 0, 60.0, -60.0)
        folded = operand_grids(scenes_llava.model, [key], "folded", statistics.passes)[key.name]
        plain = operand_grids(scenes_llava.model, [key], "tensor", statistics.passes)[key.name]
    finally:
        bias.data = own
    assert folded.signs.tolist() == [1.0 if i % 2 == 0 else -1.0 for i in range(len(own))]
    assert float(folded.high[0] - folded.low[0]) < 0.75 * float(plain.high[0] - plain.low[0])


def test_scalars_are_one_where_nothing_changed_and_have_limits() -> None:
    one = AttentionScale(torch.tensor([1.0, 2.0, 3.0]), 5.0)
    logits, output = factors(one, one)
    assert logits is not None
    assert logits.tolist() == [1, 1, 1]
    assert output == 1
    logits, output = factors(one, AttentionScale(torch.tensor([0.8, 0.1, 30.0]), 4.5))
    assert logits is not None
    assert logits.tolist() == pytest.approx([1.25, 1.4, 0.7], rel=1e-3)
    assert output == pytest.approx(5 / 4.5)
    assert factors(one, AttentionScale(None, 1.0))[1] == pytest.approx(math.exp(0.3))


def test_attention_that_lost_its_spread_gets_it_back(scenes_llava: VLM) -> None:
    """A plan whose rounding shrinks queries and outputs: afterwards both scales are the float model's."""
    parts = inspect(scenes_llava, by="kind")
    asked = scheme("rtn", 3, group="tensor", activations=3, match=True)
    (chosen,), statistics = with_calibration(scenes_llava, parts, [asked], ["vqa"], n=2, cache_gb=0)
    assert statistics is not None
    model, plan = scenes_llava.model, Plan.of(parts, {"vision.attn": chosen, "language.attn": chosen})
    modules = attention_modules(model, parts.weights)
    ends = {one.path: one.last.module for one in modules}
    before = attention_scales(model, ends, statistics.passes)
    unmatched = Plan.of(parts, {name: scheme("rtn", 3, group="tensor", activations=3) for name in ("*.attn",)})
    with quantized(model, parts, unmatched):
        lost = attention_scales(model, ends, statistics.passes)
    with quantized(model, parts, plan, None, statistics):
        matched = attention_scales(model, ends, statistics.passes)
    first = modules[0].path  # behind it, inputs change by what was matched before
    expected, _ = factors(before[first], lost[first])
    assert expected is not None
    assert bool((expected != 1).any())

    def distance(scales: dict[str, AttentionScale]) -> float:
        return sum(abs(math.log(before[path].output / scales[path].output)) for path in ends)

    assert distance(matched) < 0.7 * distance(lost)


def test_matched_logits_are_multiplied_head_by_head(attention: nn.Module) -> None:
    """Queries of one head that lost a fifth: the factor brings back the spread of its logits and of no other."""
    x = numbers(2, 9, 16)
    ends = {"a": "a.o_proj"}
    before = attention_scales(attention, ends, lambda: passes_of(attention, x))["a"]
    layer = attention["a"].q_proj  # type: ignore[index]
    layer.weight[4:8] *= 0.8
    layer.bias[4:8] *= 0.8
    after = attention_scales(attention, ends, lambda: passes_of(attention, x))["a"]
    found, _ = factors(before, after)
    assert found is not None
    assert found.tolist() == pytest.approx([1, 1.25, 1, 1], rel=1e-3)
    query, key = (one(x).unflatten(-1, (4, 4)).transpose(1, 2) for one in (layer, attention["a"].k_proj))  # type: ignore[index]
    slow = (query @ key.mT / 2).transpose(0, 1).flatten(1).std(1, correction=0)
    assert after.logits is not None
    assert torch.allclose(after.logits.float(), slow, rtol=1e-4)
    layer.weight[4:8] /= 0.8
    layer.bias[4:8] /= 0.8


def test_heads_of_a_single_query_keep_their_factors() -> None:
    """Two heads that share keys: as two heads of one row, and as one head of two rows."""
    factor, query, key = torch.tensor([0.5, 2.0]), numbers(3, 2, 1, 4), numbers(3, 1, 5, 4, seed=1)
    seen: list[Tensor] = []

    class Alone(nn.Module):
        def forward(self, query: Tensor, **more: bool) -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, key, **more)

    model = nn.ModuleDict({"a": Alone()})
    hooks = list(probability_hooks(model, "a", lambda p: p, lambda: factor))
    seen.append(model["a"](query, enable_gqa=True))
    seen.append(model["a"](query.reshape(3, 1, 2, 4)).reshape(3, 2, 1, 4))
    for hook in hooks:
        hook.remove()
    expected = ((query * factor[:, None, None]) @ key.mT / 2).softmax(-1) @ key
    assert torch.allclose(seen[0], expected, atol=1e-6)
    assert torch.allclose(seen[1], expected, atol=1e-6)
    assert not torch.allclose(model["a"](query, enable_gqa=True), expected, atol=1e-2)


def test_examples_outside_the_fences_count_nothing() -> None:
    seen = TokenNumbers()
    for example, size in enumerate([1.0, 1.1, 0.9, 1.05, 0.95, 9.0]):
        seen.numbers[example, "x"] = torch.full((3,), size)
        seen.modalities[example, "x"] = None
    found = by_filter(seen)
    assert [float(found[example, "x"].sum()) for example in range(6)] == [3, 3, 3, 3, 3, 0]
    few = TokenNumbers({key: value for key, value in seen.numbers.items() if key[0] > 2}, {})
    assert all(bool((values == 1).all()) for values in by_filter(few).values())  # three examples have no quartiles


def test_filtered_statistics_are_those_of_the_examples_that_are_left(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    weights = [weight for weight in parts.weights if weight.block == 0 and weight.part == "language"]
    every = calibration_statistics(scenes_llava, parts, ["vqa"], n=8, importance=("filtered",))
    plain, filtered = every.gather(weights), every.weighted["filtered"](weights)
    assert plain.keys() == filtered.keys()
    for name in plain:
        assert 0 < filtered[name].tokens <= plain[name].tokens
        if filtered[name].tokens == plain[name].tokens:
            assert torch.allclose(filtered[name].gram, plain[name].gram, rtol=1e-5)
