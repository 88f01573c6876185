"""ClippedRanges: searches the ranges of layers' inputs, as Q-VLM's paper or as its released code does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from sensitivity.measure.activations.joint_ranges import (
    Change,
    InputRange,
    Layer,
    Passes,
    blocks_to_search,
    search_joint_ranges,
)
from sensitivity.measure.activations.released_ranges import search_released_ranges
from sensitivity.measure.install.rounding import rounding_hooks
from sensitivity.measure.passes.block_modules import block_paths
from sensitivity.quantize.run_time.inputs import BLOCKS, RELEASED
from sensitivity.spec.components import PARTS, ComponentMap, Weight
from sensitivity.spec.plan import ACTIVATION_SCALE, KEEP, Scheme

Quantized = Callable[[str], Tensor]  # returns the weight that a plan gives to a parameter of this name


class ClippedRanges:
    """Searches the ranges of one model's inputs; `found` keeps them for later plans."""

    def __init__(self, model: nn.Module, parts: ComponentMap, passes: Passes, found: dict[Hashable, object]) -> None:
        self.model, self.parts, self.passes, self.found = model, parts, passes, found
        self.component_of = {weight.name: c.name for c in parts.components for weight in c.weights}

    def find(
        self, weights: Sequence[Weight], given: Mapping[str, Scheme], quantized: Quantized
    ) -> dict[str, InputRange]:
        """The range of each weight whose scheme asks for a search; all schemes round to the same bits."""
        result: dict[str, InputRange] = {}
        for part in PARTS:
            for scale in (BLOCKS, RELEASED):
                own = [w for w in weights if w.part == part and given[w.name].get(ACTIVATION_SCALE) == scale]
                if own and scale == RELEASED:
                    result |= self._released(part, own, given[own[0].name].activations)
                elif own:
                    result |= self._joint(part, own, given, quantized)
        return result

    def _released(self, part: str, weights: Sequence[Weight], bits: int) -> dict[str, InputRange]:
        """The released code's ranges, searched over all layers of a part, so that none of them depends on the plan."""
        key = RELEASED, part, bits
        if key not in self.found:
            every = [weight for weight in self.parts.weights if weight.part == part and not weight.is_embedding]
            self.found[key] = search_released_ranges(self.model, every, bits, self.passes)
        known = self.found[key]
        assert isinstance(known, dict)
        return {weight.name: known[weight.name] for weight in weights}

    def _joint(
        self, part: str, weights: Sequence[Weight], given: Mapping[str, Scheme], quantized: Quantized
    ) -> dict[str, InputRange]:
        """The paper's ranges, searched over blocks of dependent layers with the weights that a plan gives them."""
        bits = given[weights[0].name].activations
        asked = {weight.name for weight in weights}
        missing: dict[Hashable, list[Layer]] = {}
        keys: list[Hashable] = []
        key: Hashable
        for block in self._blocks(part, bits):
            rounded: list[Layer] = [
                (path, inside) for path, own in block if (inside := [w for w in own if w.name in asked])
            ]
            if rounded:
                # the key names all that is quantized in these blocks, since the best ranges depend on it
                key = (BLOCKS, tuple((w.name, given[w.name]) for _, own in rounded for w in own))
                keys.append(key)
                if key not in self.found:
                    missing[key] = rounded
        if missing:
            install = partial(self._installed, given, quantized)
            ranges = search_joint_ranges(self.model, list(missing.values()), bits, install, self.passes)
            for key, block in missing.items():
                self.found[key] = {w.name: ranges[w.name] for _, own in block for w in own}
        result = {weight.name: InputRange() for weight in weights}  # those outside blocks: each token's own range
        for key in keys:
            known = self.found[key]
            assert isinstance(known, dict)
            result |= known
        return result

    def _blocks(self, part: str, bits: int) -> list[list[Layer]]:
        """The blocks of a part, grouped into those that are searched together."""
        key = "blocks", part, bits
        if key not in self.found:
            every = [weight for weight in self.parts.weights if weight.part == part]
            paths = block_paths(self.model, every)
            layers = [(paths[of], [w for w in every if (w.part, w.block) == of]) for of in sorted(paths)]
            self.found[key] = blocks_to_search(self.model, layers, self.component_of, bits, self.passes)
        known = self.found[key]
        assert isinstance(known, list)
        return known

    @contextmanager
    def _installed(
        self,
        given: Mapping[str, Scheme],
        quantized: Quantized,
        weights: Sequence[Weight],
        changes: Mapping[str, Change],
    ) -> Iterator[None]:
        """Inside the `with` block, some weights are those of the plan, and the inputs of their layers are changed."""
        parameters = {w.name: self.model.get_parameter(w.name) for w in weights if given[w.name].method != KEEP}
        before = {name: parameter.data for name, parameter in parameters.items()}
        with ExitStack() as hooks:
            try:
                for name, parameter in parameters.items():
                    parameter.data = quantized(name)
                for weight in weights:
                    for hook in rounding_hooks(self.model, weight, given[weight.name], rounded=changes[weight.name]):
                        hooks.callback(hook.remove)
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.data = before[name]
