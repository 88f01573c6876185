"""RunTimeRounding: how a plan rounds in each forward pass, by calibration data where a scheme asks for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.measure.activations.adaptive_softmax import Grid, adaptive_grids
from sensitivity.measure.activations.attention_operands import OperandGrid, is_operand, operand_grids
from sensitivity.measure.activations.joint_ranges import InputRange
from sensitivity.measure.activations.matching import AttentionScale, attention_scales, factors
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.clipped_ranges import ClippedRanges, Quantized
from sensitivity.measure.install.rounding import Change, rounding_hooks
from sensitivity.measure.passes.attention_hooks import AttentionModule, attention_modules, probability_hooks
from sensitivity.measure.passes.block_modules import float_model
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.run_time.inputs import NORM, TENSOR, round_between, round_inputs
from sensitivity.quantize.run_time.probabilities import ADAPTIVE, HALVINGS, round_probabilities
from sensitivity.quantize.run_time.settings import (
    FOLDED,
    OPERANDS_TENSOR,
    has_fixed_range,
    matches_attention,
    operand_mode,
    softmax_grid,
)
from sensitivity.quantize.stored.low_rank import LowRankWeight
from sensitivity.quantize.stored.rotated import InputTransform
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.plan import ACTIVATION_SCALE, Scheme

Given = Mapping[str, Scheme]  # the scheme of each weight of a plan


class RunTimeRounding:
    """What one plan rounds in one model; `found` keeps for later plans what calibration data gave."""

    def __init__(
        self, model: nn.Module, parts: ComponentMap, statistics: Statistics | None, found: dict[Hashable, object]
    ) -> None:
        self.model, self.statistics, self.found = model, statistics, found
        self.attentions = {one.first: one for one in attention_modules(model, parts.weights)}
        self.clips = ClippedRanges(model, parts, statistics.passes if statistics else lambda: (), found)
        self.searched: dict[str, InputRange] = {}  # of weights whose inputs' ranges are searched
        self.scales: dict[str, tuple[Tensor | None, float]] = {}  # of attentions that are matched, by path

    def ranges_to_find(self, weights: Iterable[Weight], schemes_of: Mapping[str, set[Scheme]]) -> dict[str, Weight]:
        """The inputs whose range a scheme asks for and is not known yet, each with a weight that reads it."""
        return {
            input_of(weight): weight
            for weight in weights
            if not weight.is_embedding
            and any(map(has_fixed_range, schemes_of[weight.name]))
            and ("range", input_of(weight)) not in self.found
        }

    def add_ranges(self, curvatures: Mapping[str, Curvature]) -> None:
        """Keep the range of each channel of some inputs."""
        for name, seen in curvatures.items():
            self.found["range", name] = seen.low.clone(), seen.high.clone()

    def search(self, weights: Sequence[Weight], given: Given, own: Mapping[str, Tensor], quantized: Quantized) -> None:
        """Find the ranges and scales that the schemes of some weights ask for, in the model with its present weights.

        `own` are the float weights, and `quantized` returns those of the plan.
        """
        if self.statistics is None:
            return
        for bits in sorted({given[weight.name].activations for weight in weights}):
            of_bits = [w for w in weights if given[w.name].activations == bits and not w.is_embedding]
            self.searched |= self.clips.find(of_bits, given, quantized)
        for weight in weights:
            # found now: hooks that round a norm's output also read it, and then the norm would not qualify
            if given[weight.name].get(ACTIVATION_SCALE) == NORM:
                self.found.setdefault(("norm", input_of(weight)), self.statistics.after_norm(input_of(weight)))
        here = [(self.attentions[w], given[w.name]) for w in weights if w in self.attentions]
        adaptive: dict[str, set[int]] = {}
        for attention, chosen in here:
            if softmax_grid(chosen) == ADAPTIVE and ("softmax", attention.path, chosen.activations) not in self.found:
                adaptive.setdefault(attention.path, set()).add(chosen.activations)
        if adaptive:
            for key, grid in adaptive_grids(self.model, adaptive, self.statistics.passes).items():
                self.found["softmax", *key] = grid
        for mode in (OPERANDS_TENSOR, FOLDED):
            operands = [w for w in weights if is_operand(w) and operand_mode(given[w.name]) == mode]
            if missing := [w for w in operands if ("operand", mode, w.name) not in self.found]:
                for name, operand in operand_grids(self.model, missing, mode, self.statistics.passes).items():
                    self.found["operand", mode, name] = operand
        matched = {a.path: a.last.module for a, s in here if matches_attention(s)}
        if missing_paths := {path: last for path, last in matched.items() if ("float", path) not in self.found}:
            with float_model(self.model, own):
                scales = attention_scales(self.model, missing_paths, self.statistics.passes)
            self.found |= {("float", path): scale for path, scale in scales.items()}

    def hooks(self, weight: Weight, chosen: Scheme, stored: object) -> Iterator[RemovableHandle]:
        """Register hooks for all that a scheme rounds at one layer, and at the attention whose first layer it is."""
        device = self.model.get_parameter(weight.name).device
        # ranges are searched for inputs without a transform
        untransformed = stored is None or weight.is_embedding or weight.name in self.searched
        transform = None if untransformed else InputTransform.of(stored, device)
        low_rank = stored if isinstance(stored, LowRankWeight) else None
        rounded = self._rounded(weight, chosen, transform)
        yield from rounding_hooks(self.model, weight, chosen, transform, rounded, low_rank)
        if operand_mode(chosen) and is_operand(weight):
            yield self._operand_hook(weight, chosen)
        if (attention := self.attentions.get(weight)) and (softmax_grid(chosen) or matches_attention(chosen)):
            change = self._probabilities(attention, chosen)
            yield from probability_hooks(self.model, attention.path, change, partial(self._factor, attention.path))

    def match(self, given: Given) -> Iterator[RemovableHandle]:
        """Scale attention to the float model's where a scheme asks for it, once all of a plan is in the model."""
        every = [one for one in self.attentions.values() if one.first.name in given]
        outputs = {one.path: one.last.module for one in every if matches_attention(given[one.first.name])}
        if not outputs or self.statistics is None:
            return
        key = "matched", frozenset(given.items())
        if key not in self.found:
            self.found[key] = attention_scales(self.model, outputs, self.statistics.passes)
        quantized = self.found[key]
        assert isinstance(quantized, dict)
        for path, last in outputs.items():
            unquantized = self.found["float", path]
            assert isinstance(unquantized, AttentionScale)
            self.scales[path] = factors(unquantized, quantized[path])
            yield self._output_hook(last, self.scales[path][1])

    def _rounded(self, weight: Weight, chosen: Scheme, transform: InputTransform | None) -> Change | None:
        """The function that rounds a layer's inputs in a range from calibration; None where each token has its own."""
        if weight.name in self.searched:
            return self.searched[weight.name].rounded(chosen.activations)
        if not has_fixed_range(chosen) or weight.is_embedding:
            return None
        known = self.found["range", input_of(weight)]
        assert isinstance(known, tuple)
        low, high = known
        if transform is not None and transform.before is not None:
            low, high = (one / transform.before.to(one.device) for one in (low, high))
        if chosen.get(ACTIVATION_SCALE) == TENSOR:
            return partial(round_inputs, bits=chosen.activations, largest=torch.maximum(-low, high).max())
        if not self.found["norm", input_of(weight)]:
            low, high = low.min(), high.max()
        return partial(round_between, bits=chosen.activations, low=low, high=high)

    def _operand_hook(self, weight: Weight, chosen: Scheme) -> RemovableHandle:
        known = self.found["operand", operand_mode(chosen), weight.name]
        assert isinstance(known, OperandGrid)
        grid, bits = known, chosen.activations

        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            signs = grid.signs.to(output)
            return round_between(output * signs, bits, grid.low, grid.high) * signs

        return self.model.get_submodule(weight.module).register_forward_hook(hook)

    def _probabilities(self, attention: AttentionModule, chosen: Scheme) -> Callable[[Tensor], Tensor]:
        """The function that changes the probabilities of an attention."""
        grid, bits = softmax_grid(chosen), chosen.activations
        if grid is None:
            return lambda probabilities: probabilities
        found: Grid = (HALVINGS.get(grid, 0), 1.0)
        if grid == ADAPTIVE:
            known = self.found["softmax", attention.path, bits]
            assert isinstance(known, tuple)
            found = known
        return lambda probabilities: round_probabilities(probabilities, bits, *found)

    def _factor(self, path: str) -> Tensor | None:
        return self.scales[path][0] if path in self.scales else None

    def _output_hook(self, path: str, factor: float) -> RemovableHandle:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            return None if factor == 1.0 else output * factor

        return self.model.get_submodule(path).register_forward_hook(hook)
