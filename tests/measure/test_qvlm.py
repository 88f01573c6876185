"""Q-VLM: dependent blocks, ranges that are searched jointly, and those of the released code, against plain versions."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.activations import joint_ranges as search
from sensitivity.measure.activations.block_chain import outputs, recorded_calls
from sensitivity.measure.activations.joint_ranges import best_ranges, blocks_to_search
from sensitivity.measure.activations.released_ranges import SHRINK, search_released_ranges
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.install.clipped_ranges import ClippedRanges
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.block_modules import block_paths
from sensitivity.measure.passes.token_batches import answer_batches as token_batches
from sensitivity.measure.passes.token_batches import calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.run_time.dependency import DEPTH, blocks_of, codes_of, conditional_entropy
from sensitivity.quantize.run_time.inputs import percentiles, round_between, round_each_token
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dependency_is_the_conditional_entropy_of_codes() -> None:
    before, after = numbers(60, 4), numbers(60, 4, seed=1)
    first, second = (codes_of(values, 2).flatten().tolist() for values in (before, after))
    slow = 0.0
    for x, y in itertools.product(range(4), repeat=2):
        both = sum(a == x and b == y for a, b in zip(first, second, strict=True))
        if both:
            slow -= both / len(first) * math.log(both / first.count(x))
    assert conditional_entropy(before, after, 2) == pytest.approx(slow)
    # the code of the first decides that of the second
    assert conditional_entropy(before, 3 * before + 1, 4) == pytest.approx(0, abs=1e-9)
    even = torch.arange(16).float()
    assert conditional_entropy(even // 4, even % 4, 2) == pytest.approx(math.log(4))


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_those_of_the_rule(seed: int) -> None:
    values = numbers(11, seed=seed).abs().tolist()
    cuts = (numbers(11, seed=seed + 50) > 1).tolist()
    found, threshold = blocks_of(values, cuts), sum(values) / len(values)
    assert list(itertools.chain(*found)) == list(range(12))
    assert max(map(len, found)) <= DEPTH
    for block in found:
        for end in range(1, len(block)):  # each prefix of a block is a block by itself
            inside = values[block[0] : block[end]]
            assert sum(inside) > end * threshold
            assert not cuts[block[end] - 1]
        after = block[-1]
        if after < 11 and len(block) < DEPTH and not cuts[after]:
            assert sum(values[block[0] : after + 1]) <= len(block) * threshold
    assert blocks_of([1.0, 1.0]) == [[0], [1], [2]]  # none above the mean
    assert blocks_of([9.0, 9.0, 0.0, 0.0], depth=1) == [[i] for i in range(5)]  # layer by layer
    assert (
        blocks_of([9.0, 9.0, 9.0, 0.0, 0.0]) == [[0, 1, 2], [3], [4], [5]] or len(blocks_of([9.0] * 3 + [0.0] * 2)) < 6
    )


def test_percentiles_leave_out_a_share_at_either_side() -> None:
    values = torch.arange(-50.0, 51).reshape(-1, 1)
    assert [float(one) for one in percentiles(values, 1.0, 0)] == [-50, 50]
    assert [float(one) for one in percentiles(values, 0.98, 0)] == [-48, 48]
    x = numbers(5, 40)
    assert torch.equal(round_each_token(x, 4), round_between(x, 4, x.amin(1, keepdim=True), x.amax(1, keepdim=True)))
    assert torch.equal(round_each_token(x, 4, 0.95)[2:], round_each_token(x[2:], 4, 0.95))  # token by token


class Rounding(nn.Module):
    """A linear layer with rounded weights, which rounds its inputs by itself."""

    def __init__(self, linear: nn.Linear, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bias, self.how = linear.bias, how
        self.weight = nn.Parameter(fake_quantize(linear.weight.detach(), scheme("rtn", 3)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.how(x), self.weight, self.bias)


@pytest.fixture(scope="module")
def language(scenes_llava: VLM) -> tuple[Any, ...]:
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=2)
    every = [weight for weight in parts.weights if weight.part == "language" and weight.block in (0, 1)]
    paths = block_paths(scenes_llava.model, every)
    layers = [(paths[of], [w for w in every if (w.part, w.block) == of]) for of in sorted(paths)]
    calls = recorded_calls(scenes_llava.model, [path for path, _ in layers], statistics.passes, 2)
    return parts, statistics, layers, calls


def test_joint_ranges_are_the_best_and_never_worse_than_layer_by_layer(
    scenes_llava: VLM, language: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All combinations on a copy whose layers round by themselves; and each layer chosen by its own output alone."""
    parts, statistics, layers, calls = language
    shares = (1.0, 0.99, 0.9)
    monkeypatch.setattr(search, "PERCENTILES", shares)
    chosen = scheme("rtn", 3, activations=3, activation_scale="blocks", calibration=statistics.facts)
    given = {weight.name: chosen for _, weights in layers for weight in weights}
    rounding = ClippedRanges(scenes_llava.model, parts, statistics.passes, {})
    own = {name: fake_quantize(scenes_llava.model.get_parameter(name).detach(), scheme("rtn", 3)) for name in given}
    block = [(one, weights) for one, (_, weights) in zip(calls, layers, strict=True)]

    def install(weights: Any, changes: Any) -> Any:
        return rounding._installed(given, lambda name: own[name], weights, changes)

    found, error = best_ranges(scenes_llava.model, block, 3, install)
    # the plain version: tokens of every input of the float chain, and a copy of the model for each combination
    seen: dict[str, list[Tensor]] = {}
    handles = [
        scenes_llava.model.get_submodule(weight.module).register_forward_pre_hook(
            lambda _, args, name=weight.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for _, weights in layers
        for weight in weights
    ]
    target = outputs(calls)
    first_target = outputs(calls[:1])
    for handle in handles:
        handle.remove()
    # two runs of the first block: its tokens are there twice, which changes no percentile of the first half
    tokens = {name: torch.cat(values[: len(calls[0].calls)]) for name, values in seen.items()}

    def slow(combination: tuple[float, ...], depth: int) -> float:
        model = copy.deepcopy(scenes_llava.model)
        for share, (_, weights) in zip(combination, layers, strict=False):
            for weight in weights:
                low, high = percentiles(tokens[weight.name], share, 0)
                how = lambda x, low=low, high=high: round_between(x, 3, low[0], high[0])  # noqa: E731
                model.set_submodule(weight.module, Rounding(model.get_submodule(weight.module), how))
        chain = [
            type(one)(model.get_submodule(path), one.calls)
            for one, (path, _) in zip(calls[:depth], layers, strict=False)
        ]
        ends = outputs(chain)
        goal = target if depth == 2 else first_target
        return sum(float((a - b).square().sum()) for a, b in zip(ends, goal, strict=True))

    errors = {combination: slow(combination, 2) for combination in itertools.product(shares, repeat=2)}
    best = min(errors, key=lambda combination: errors[combination])
    assert error == pytest.approx(errors[best], rel=1e-3)
    first = min(shares, key=lambda share: slow((share,), 1))
    second = min(shares, key=lambda share: errors[first, share])
    assert error <= errors[first, second] * (1 + 1e-3)
    assert max(errors.values()) > 1.01 * error
    name = layers[0][1][0].name
    low, high = percentiles(tokens[name], best[0], 0)
    assert torch.allclose(found[name].low, low[0])
    assert torch.allclose(found[name].high, high[0])
    for original in own:
        assert not torch.equal(scenes_llava.model.get_parameter(original), own[original])  # the model is itself again


def test_blocks_end_at_the_edges_of_components(scenes_llava: VLM, language: tuple[Any, ...]) -> None:
    parts, statistics, *_ = language
    every = [weight for weight in parts.weights if weight.part == "language"]
    paths = block_paths(scenes_llava.model, every)
    layers = [(paths[of], [w for w in every if (w.part, w.block) == of]) for of in sorted(paths)]
    for by in ("part", "block"):
        component_of = {w.name: c.name for c in inspect(scenes_llava, by=by).components for w in c.weights}
        found = blocks_to_search(scenes_llava.model, layers, component_of, 4, statistics.passes)
        assert [path for block in found for path, _ in block] == [path for path, _ in layers]
        assert max(map(len, found)) == 1 if by == "block" else max(map(len, found)) > 1


def test_released_ranges_are_of_channels_and_shrunk_by_their_own_error(
    scenes_llava: VLM, language: tuple[Any, ...]
) -> None:
    parts, statistics, *_ = language
    every = [weight for weight in parts.weights if weight.part == "language" and not weight.is_embedding]
    found = search_released_ranges(scenes_llava.model, every, 4, statistics.passes)
    assert set(found) == {weight.name for weight in every}
    seen: dict[str, list[Tensor]] = {}
    handles = [
        scenes_llava.model.get_submodule(w.reader).register_forward_pre_hook(
            lambda _, args, name=w.name: seen.setdefault(name, []).append(args[0])
        )
        for w in every
    ]
    for _ in statistics.passes():
        pass
    for handle in handles:
        handle.remove()
    for weight in every:
        one, leaf = found[weight.name], weight.module.rpartition(".")[2]
        if leaf in ("o_proj", "down_proj"):
            assert one.low is None  # found anew for each token
            continue
        tokens = torch.cat([values.flatten(0, -2) for values in seen[weight.name]])
        low, high = tokens.amin(0).clamp(max=0), tokens.amax(0).clamp(min=0)
        if weight.block is not None and weight.block % 3 == 1:  # it takes every range
            errors = {
                factor: sum(
                    float((round_between(x, 4, low * factor, high * factor) - x).abs().sqrt().mean())
                    for x in seen[weight.name][:2]
                )
                for factor in SHRINK
            }
            factor = min(errors, key=lambda shrink: errors[shrink])
            assert torch.allclose(one.high, high * factor, rtol=1e-5)
        assert bool((one.low >= low - 1e-5).all())
        assert bool((one.high <= high + 1e-5).all())
        assert one is found[next(w.name for w in every if input_of(w) == input_of(weight))]


@pytest.mark.parametrize("name", ["qvlm", "qvlm-released"])
def test_rows_run_in_every_part(scenes_llava: VLM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PERCENTILES", (1.0, 0.99))
    parts = inspect(scenes_llava, by="part")
    asked = [scheme(name, 4), scheme(name, 4, activations=8)]
    schemes, statistics = with_calibration(scenes_llava, parts, asked, ["vqa"], n=2, cache_gb=0)
    memory, batch = WeightCodes(), next(token_batches(scenes_llava, [task("vqa", n=3)]))

    def logits() -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(calibration_pass(scenes_llava, batch).logits)

    before, errors = logits(), []
    for chosen in schemes:
        runs = []
        for kept in (memory, None) if chosen.activations == 4 else (memory,):
            with quantized(scenes_llava.model, parts, Plan.uniform(parts, chosen), kept, statistics):
                runs.append(logits())
        assert all(torch.equal(runs[0], run) for run in runs)
        errors.append(float((runs[0] - before).square().mean()))
    assert torch.equal(logits(), before)
    assert errors[0] > errors[1] > 0
