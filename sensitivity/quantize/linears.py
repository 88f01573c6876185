"""Linears and Method: weights that read one input, and what a row of METHODS says about a way to quantize them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sensitivity.quantize.curvature import Curvature
from sensitivity.quantize.grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Scheme, Setting


class StoredWeight(Protocol):
    """A weight as it is stored, and how it becomes numbers again."""

    def dequantize(self) -> Tensor: ...


@dataclass(frozen=True)
class Linears:
    """Weights of linear layers that read the same input, and what is known about it."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    curvature: Curvature | None = None
    foldable: bool = True  # whether something before them can take over a scale per input channel

    @cached_property
    def rows(self) -> Tensor:
        """All their rows, one weight after the other."""
        return torch.cat([weight.detach().float() for weight in self.weights])

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def name(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} and {len(self.names) - 1} more"

    @property
    def seen(self) -> Curvature:
        assert self.curvature is not None, f"{self.name}: a calibrated method without statistics"
        return self.curvature

    def split(self, whole: QuantizedWeight) -> list[QuantizedWeight | None]:
        """A result for all rows as one for each weight."""
        sizes = [len(weight) for weight in self.weights]
        pieces = zip(*(torch.split(t, sizes) for t in (whole.codes, whole.scale, whole.zero)), strict=True)
        return [QuantizedWeight(codes, scale, zero, whole.group, whole.inputs) for codes, scale, zero in pieces]


# the weights of one input at several schemes that differ in bits alone: per scheme a result for each weight
Solve = Callable[[Linears, Sequence[Scheme]], Sequence[Sequence[StoredWeight | None]]]


@dataclass(frozen=True)
class Method:
    """One way to quantize weights: how, at which widths, and what its scheme says without further words."""

    solve: Solve
    widths: range = range(1, 9)
    group: int | str = "row"
    symmetric: bool = True
    calibrated: bool = False  # needs statistics of the inputs
    settings: Mapping[str, Setting] = field(default_factory=dict)  # its own few, and their defaults
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of each setting that is a number
    choices: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)  # where a setting is one of a few
    fixed: str = ""  # what cannot be chosen about its groups and grid, in words
    inputs: Callable[[Tensor, Scheme], Tensor] | None = None  # what happens to a layer's inputs when the model runs


def alone(quantize: Callable[[Tensor, Scheme], StoredWeight | None]) -> Solve:
    """A method that looks at one weight and one scheme at a time."""
    return lambda linears, schemes: [[quantize(w.detach(), scheme) for w in linears.weights] for scheme in schemes]


def reads(weight: Weight) -> str:
    """The name of the input that a weight reads: equal for weights that share it."""
    return weight.shares_input or weight.reader
