"""Codes of calibrated methods, computed again block by block in data-flow order, as when the plan was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sensitivity.formats.writing.job import Codes, codes_from_weights
from sensitivity.measure.calibrate.statistics import Statistics, by_importance
from sensitivity.measure.install.fold import fold_scales
from sensitivity.measure.install.plan_in_model import targets
from sensitivity.measure.install.rounding import rounding_hooks
from sensitivity.measure.install.tweaked_norms import TweakedNorms
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.run_time.settings import tweaks_norms
from sensitivity.quantize.solving import solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, scale_as_16_bit
from sensitivity.quantize.stored.rotated import InputTransform
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.plan import Plan, Scheme


@dataclass
class CalibratedCodes:
    """A function that computes the codes of weights in data-flow order, and what else has changed in the model."""

    codes: Codes
    changed: dict[str, Tensor] = field(default_factory=dict)  # norms that were tweaked, parameters that absorbed scales
    folded: dict[str, str] = field(default_factory=dict)  # input -> the layer that absorbed its scales
    unscaled: dict[str, set[str]] = field(default_factory=dict)  # component -> layers whose scales nothing can absorb

    @property
    def notes(self) -> list[str]:
        """Notes for the model card about folded scales."""
        if not self.folded and not self.unscaled:
            return []
        words = [
            f"The scales of {len(self.folded)} inputs are folded into the layers before them, which changes what these "
            "compute only by rounding to what the file stores."
        ]
        if self.unscaled:
            listed = "; ".join(f"{name}: {', '.join(sorted(layers))}" for name, layers in self.unscaled.items())
            words.append(
                f"Layers after something that cannot absorb scales, such as a GELU, were measured and written without "
                f"scales: {listed}. To scale them too, use --set scales=stored and --format fake, or use gptq, which "
                "needs no scales."
            )
        return [" ".join(words)]


@contextmanager
def codes(
    vlm: VLM, parts: ComponentMap, plan: Plan, statistics: Statistics, folding: bool = False
) -> Iterator[CalibratedCodes]:
    """Inside the block, compute codes of weights that are requested in data-flow order, as `write_checkpoint` does.

    On the exposed path, each block of layers is quantized inside the model before the next one is calibrated; at the
    end the model gets its own weights back. The codes of at most one block of layers are in memory. With `folding`, the
    layer before absorbs the scales of inputs, for formats that cannot store them.
    """
    work = _BlockByBlock(vlm, parts, plan, statistics, folding)
    try:
        yield work.result
    finally:
        work.restore()


class _BlockByBlock:
    """Computes codes block by block as they are requested, and tracks what the model holds meanwhile."""

    def __init__(self, vlm: VLM, parts: ComponentMap, plan: Plan, statistics: Statistics, folding: bool) -> None:
        self.model: nn.Module = vlm.model
        self.statistics, self.folding = statistics, folding
        self.parameters = dict(vlm.model.named_parameters())
        self.float_weights = {name: parameter.data for name, parameter in self.parameters.items()}
        self.schemes = targets(parts, plan)
        # by block, so that at most one block is solved ahead, whatever the granularity of the plan
        changed = ([w for w in c.weights if w.name in self.schemes] for c in parts.regroup("block").components)
        self.blocks = iter([block for block in changed if block])
        self.done: list[tuple[str, Scheme]] = []
        self.inputs: dict[str, list[Weight]] = {}
        for weight in parts.weights:
            self.inputs.setdefault(input_of(weight), []).append(weight)
        self.component_of = {
            weight.name: component.name for component in parts.components for weight in component.weights
        }
        self.found: dict[str, StoredWeight | None] = {}
        self.result = CalibratedCodes(self.codes_of)
        self.hooks: list[RemovableHandle] = []  # they round the activations of blocks that are installed in the model
        self.norms = TweakedNorms(self.model, parts, statistics.passes, statistics.depends_on_plan, {})

    def codes_of(self, name: str, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """The codes of one weight; all blocks are solved up to the one that contains it."""
        if name not in self.component_of:
            return codes_from_weights(name, weight, scheme)  # a bias
        while name not in self.found:
            self._solve(next(self.blocks))
        return self.found.pop(name)

    def _solve(self, block: Sequence[Weight]) -> None:
        """Quantize one block. Weights that share an input are solved together, as when the plan was measured.

        The solver gets every weight that reads the input, even those that the plan leaves at native precision, since a
        scale search minimizes the error of all of them.
        """
        shared = {input_of(w): {self.schemes[v.name] for v in block if input_of(v) == input_of(w)} for w in block}
        curvatures = self.statistics.gather_for(shared, self.inputs, tuple(self.done))
        for key, schemes in shared.items():
            names = tuple(weight.name for weight in self.inputs[key])
            foldable = any(s.get("scales") == "folded" for s in schemes) and key in self.statistics.absorbers
            weights = tuple(self.float_weights[name] for name in names)
            normed = self.statistics.after_norm_for(key, schemes)
            fisher = self.statistics.fisher_of(names, schemes, self.float_weights)
            whole = Linears(names, weights, foldable=foldable, after_norm=normed, fisher=fisher)
            for linears, alike in by_importance(whole, schemes, curvatures[key]):
                for scheme, results in zip(alike, solve(linears, alike), strict=True):
                    self.found |= {
                        name: result
                        for name, result in zip(names, results, strict=True)
                        if self.schemes.get(name) == scheme
                    }
        tweaking = any(tweaks_norms(self.schemes[weight.name]) for weight in block)
        if self.statistics.depends_on_plan or tweaking:
            self._install(block)
        if tweaking:
            self._tweak(block)
        self.done += [(weight.name, self.schemes[weight.name]) for weight in block]
        if self.folding:
            self._fold({weight.name: weight for weight in block})

    def _install(self, block: Sequence[Weight]) -> None:
        """Put the quantized weights of a block into the model, so that later blocks calibrate on its real outputs."""
        for weight in block:
            own = self.float_weights[weight.name]
            transform = InputTransform.of(self.found[weight.name], own.device)
            self.hooks += rounding_hooks(self.model, weight, self.schemes[weight.name], transform)
            if (result := self.found[weight.name]) is not None:
                self.parameters[weight.name].data = result.dequantize().to(own.dtype)
            if weight.bias and weight.bias in self.schemes:
                bias = self.float_weights[weight.bias]
                rounded = codes_from_weights(weight.bias, bias.reshape(1, -1), self.schemes[weight.bias])
                assert rounded is not None  # methods that can return None never round biases
                self.parameters[weight.bias].data = rounded.dequantize().to(bias.dtype).reshape(bias.shape)

    def _tweak(self, block: Sequence[Weight]) -> None:
        """Tweak the norms of a block that is installed in the model; on the float path, take the block out again."""
        norms = self.norms.of_block(block, self.schemes, self.float_weights)
        self.result.changed |= norms
        for name, tensor in norms.items():
            self.parameters[name].data = tensor
        if not self.statistics.depends_on_plan:
            self.restore()

    def restore(self) -> None:
        """Give the model its own weights back."""
        for name, parameter in self.parameters.items():
            parameter.data = self.float_weights[name]
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _fold(self, block: Mapping[str, Weight]) -> None:
        """Fold the scales of a block, keep what that changes for the export, and restore the model.

        Later blocks must see the same activations as in the sweep, and folded layers give them only up to rounding.
        """
        for name, weight in block.items():
            if self.schemes[name].get("scales") == "folded" and input_of(weight) not in self.statistics.absorbers:
                self.result.unscaled.setdefault(self.component_of[name], set()).add(weight.module.rpartition(".")[2])
        results = {name: stored for name in block if isinstance(stored := self.found[name], QuantizedWeight)}
        scaled = {input_of(block[name]) for name, result in results.items() if result.inputs is not None}
        if not scaled:
            return
        held = {name: parameter.data for name, parameter in self.parameters.items()}
        # start from what earlier folds have changed, such as the bias of a value projection
        for name, tensor in self.result.changed.items():
            self.parameters[name].data = tensor
        try:
            into = self.statistics.absorbers
            folded = fold_scales(self.model, results, {name: input_of(weight) for name, weight in block.items()}, into)
            self.result.folded |= {key: into[key].path for key in scaled}
            for name, parameter in self.parameters.items():
                if parameter.data is not held[name] and name not in folded:
                    self.result.changed[name] = parameter.data
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = held[name]
        for name, result in folded.items():  # folding divided this scale: round it to the 16 bits that are stored
            if result.scale is not results[name].scale:
                result = replace(result, scale=scale_as_16_bit(result.scale, self.float_weights[name].dtype))
            self.found[name] = result


__all__ = ["CalibratedCodes", "codes"]
