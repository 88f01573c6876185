"""Ranges of layers' inputs as Q-VLM's released code finds them, layer by layer, each from its own input alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensitivity.measure.activations.joint_ranges import InputRange
from sensitivity.measure.passes.block_modules import layer_input
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.run_time.dependency import codes_of, conditional_entropy, entropy
from sensitivity.quantize.run_time.inputs import round_between, round_each_token
from sensitivity.spec.components import Weight

SAMPLES, SEARCHED = 8, 2  # passes whose ranges are collected, and passes on which shrink factors are compared
SHRINK, SHRINK_VISION = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4), (1.0, 0.999, 0.998)
POWER = 0.5  # to which absolute errors are raised before they are averaged
PERIOD, PHASE = 3, 1  # in every third block, those with number 1, 4, 7 ..., each pass widens the ranges
# layers whose range the released code finds anew for each prompt; here each token has its own
NEW_EACH_TIME = ("o_proj", "out_proj", "down_proj", "fc2")


@dataclass
class _Layer:
    """A layer that reads an input of its own, and the range of that input so far."""

    weight: Weight
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def static(self) -> bool:
        """Whether calibration gives it a range for each channel."""
        return self.weight.part != "vision" and self.weight.module.rpartition(".")[2] not in NEW_EACH_TIME

    def widen(self, values: Tensor) -> None:
        """Widen the range to these values and to 0."""
        low, high = torch.aminmax(values.float().flatten(0, -2), dim=0)
        low, high = low.clamp(max=0), high.clamp(min=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def search_released_ranges(
    model: nn.Module, weights: Sequence[Weight], bits: int, passes: Callable[[], Iterable[object]]
) -> dict[str, InputRange]:
    """By weight: the range of its input.

    A pass widens a layer's range if it is the first pass, if the layer is the first or in every third block, or if the
    entropy or dependency of the layer before is at least the mean of those recorded so far. Then the range is
    multiplied by the factor with the least mean square root of the input's absolute error.
    """
    layers = [_Layer(weight) for weight in {input_of(w): w for w in reversed(weights)}.values()][::-1]
    recorded: list[float] = []
    samples: list[Mapping[str, Tensor]] = []
    for inputs in _inputs(model, layers, passes):
        before: float | None = None
        for previous, layer in zip([None, *layers], layers, strict=False):
            values = inputs.get(layer.weight.name)
            if values is None:
                continue
            third = layer.weight.block is not None and layer.weight.block % PERIOD == PHASE
            below_mean = before is not None and before < sum(recorded) / len(recorded)
            if not samples or third or not below_mean:
                layer.widen(values)
            before = _measure(None if previous is None else inputs.get(previous.weight.name), values, layer, bits)
            recorded.append(before)
        samples.append(inputs if len(samples) < SEARCHED else {})
        if len(samples) == SAMPLES:
            break
    chosen = {input_of(layer.weight): _shrunk(layer, samples[:SEARCHED], bits) for layer in layers}
    return {weight.name: chosen[input_of(weight)] for weight in weights}


def _measure(before: Tensor | None, values: Tensor, layer: _Layer, bits: int) -> float:
    """The dependency on the layer before; for a block's first layer, or if the widths differ, the input's entropy."""
    leaf = layer.weight.module.rpartition(".")[2]
    if before is None or before.shape != values.shape or leaf in ("q_proj", "down_proj", "fc2"):
        return entropy(codes_of(values.flatten(0, -2), bits))
    return conditional_entropy(before, values, bits)


def _shrunk(layer: _Layer, samples: Sequence[Mapping[str, Tensor]], bits: int) -> InputRange:
    """The layer's range times the factor with the least error on some passes."""
    seen = [inputs[layer.weight.name] for inputs in samples if layer.weight.name in inputs]
    vision = layer.weight.part == "vision"
    if not layer.static and not vision:
        return InputRange()
    errors: dict[float, float] = {}
    for factor in SHRINK_VISION if vision else SHRINK:
        errors[factor] = 0.0
        for values in seen:
            rounded = _rounded(layer, values, bits, factor)
            errors[factor] += float((rounded.float() - values.float()).abs().pow(POWER).mean())
    factor = min(errors, key=lambda one: errors[one])
    if vision or layer.low is None or layer.high is None:
        return InputRange(shrink=factor)
    return InputRange(layer.low * factor, layer.high * factor)


def _rounded(layer: _Layer, values: Tensor, bits: int, factor: float) -> Tensor:
    """Values rounded in the layer's range, or in each token's own, times a factor."""
    if not layer.static or layer.low is None or layer.high is None:
        return round_each_token(values, bits, shrink=factor)
    return round_between(values, bits, layer.low * factor, layer.high * factor)


def _inputs(
    model: nn.Module, layers: Sequence[_Layer], passes: Callable[[], Iterable[object]]
) -> Iterable[Mapping[str, Tensor]]:
    """The input of every layer in each pass."""
    current: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def note(
                module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = layer.weight.name
            ) -> None:
                current[name] = layer_input(args, kwargs)

            module = model.get_submodule(layer.weight.reader)
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for _ in passes():
            yield dict(current)
            current.clear()
