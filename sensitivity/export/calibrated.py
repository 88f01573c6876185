"""Codes of calibrated methods, found again block by block in the direction of data flow, as when they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sensitivity.components import ComponentMap, Weight
from sensitivity.export.job import Codes, from_weights_alone
from sensitivity.models import VLM
from sensitivity.plan import Plan, Scheme
from sensitivity.quantize import Linears, Statistics, method_of, solve, targets
from sensitivity.quantize.linears import reads


@contextmanager
def codes(vlm: VLM, parts: ComponentMap, plan: Plan, statistics: Statistics) -> Iterator[Codes]:
    """Inside the block, codes for weights that are asked for in the direction of data flow, as `checkpoint` does.

    On the exposed path each block is quantised in the model before the next one is studied; afterwards the model has
    its own weights again. No more than one block's codes are in memory.
    """
    work = _Work(vlm, parts, plan, statistics)
    try:
        yield work.give
    finally:
        for name, parameter in work.parameters.items():
            parameter.data = work.own[name]


class _Work:
    def __init__(self, vlm: VLM, parts: ComponentMap, plan: Plan, statistics: Statistics) -> None:
        self.statistics = statistics
        self.parameters = dict(vlm.model.named_parameters())
        self.own = {name: parameter.data for name, parameter in self.parameters.items()}
        self.asked = targets(parts, plan)
        chosen = ([w for w in c.weights if w.name in self.asked] for c in parts.regroup("block").components)
        self.blocks = iter([block for block in chosen if block])
        self.inputs: dict[str, list[Weight]] = {}
        for weight in parts.weights:
            self.inputs.setdefault(reads(weight), []).append(weight)
        self.weights = {weight.name for weight in parts.weights}
        self.found: dict[str, Any] = {}

    def give(self, name: str, weight: Tensor, scheme: Scheme) -> Any:
        if name not in self.weights:
            return from_weights_alone(name, weight, scheme)  # a bias
        while name not in self.found:
            self._solve(next(self.blocks))
        return self.found.pop(name)

    def _solve(self, block: Sequence[Weight]) -> None:
        """Weights that share an input are solved together, always all of them, as when the plan was measured."""
        shared = {reads(w): {self.asked[v.name] for v in block if reads(v) == reads(w)} for w in block}
        studied = sorted(key for key, schemes in shared.items() if any(method_of(s).calibrated for s in schemes))
        curvatures = self.statistics.gather([self.inputs[key][0] for key in studied]) if studied else {}
        for key, schemes in shared.items():
            names = tuple(weight.name for weight in self.inputs[key])
            foldable = any(s.get("scales") == "folded" for s in schemes) and key in self.statistics.absorbers
            linears = Linears(names, tuple(self.own[name] for name in names), curvatures.get(key), foldable)
            ordered = sorted(schemes, key=str)
            for scheme, results in zip(ordered, solve(linears, ordered), strict=True):
                self.found |= {
                    name: result for name, result in zip(names, results, strict=True) if self.asked.get(name) == scheme
                }
            if linears.curvature is not None:
                linears.curvature.forget()
        if self.statistics.exposed:
            self._install(block)

    def _install(self, block: Sequence[Weight]) -> None:
        for weight in block:
            if (result := self.found[weight.name]) is not None:
                own = self.own[weight.name]
                self.parameters[weight.name].data = result.dequantise().to(own.dtype)
            if weight.bias and weight.bias in self.asked:
                bias = self.own[weight.bias]
                result = from_weights_alone(weight.bias, bias.reshape(1, -1), self.asked[weight.bias])
                self.parameters[weight.bias].data = result.dequantise().to(bias.dtype).reshape(bias.shape)
