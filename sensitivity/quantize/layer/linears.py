"""Linears: weights that read one input; Method: what a row of METHODS says about a quantization method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme, Setting


@dataclass(frozen=True)
class Linears:
    """Weights of linear layers that read the same input, with the statistics of that input."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    curvature: Curvature | None = None
    foldable: bool = True  # whether the layer before these can absorb a scale per input channel
    after_norm: bool = False  # whether the layer before these is a norm
    # squared gradients of the loss, in the shape of each weight (a diagonal Fisher matrix); None: not collected
    fisher: tuple[Tensor, ...] | None = None
    original_dtype: torch.dtype | None = None  # of the weights before a transform made them float32; None: no transform

    @cached_property
    def rows(self) -> Tensor:
        """The rows of all weights, stacked: they share their input, so they are quantized as one matrix."""
        return torch.cat([weight.detach().float() for weight in self.weights])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights as the model has them, which decides the 16-bit dtype of scales."""
        return self.original_dtype or self.weights[0].dtype

    @property
    def name(self) -> str:
        """A name for messages."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} and {len(self.names) - 1} more"

    @property
    def input_statistics(self) -> Curvature:
        """The statistics of the input, which a calibrated method must have."""
        assert self.curvature is not None, f"{self.name}: a calibrated method without statistics"
        return self.curvature

    @property
    def both_paths(self) -> TwoPaths:
        """How the input differs from the float model's; known only where calibration ran on both paths."""
        if self.input_statistics.paths is None:
            raise UserError(f"{self.name}: a shifted target needs the inputs of both paths; calibrate on path 'both'")
        return self.input_statistics.paths

    def split(self, whole: QuantizedWeight) -> list[QuantizedWeight | None]:
        """Split the result for the stacked rows into one result per weight."""
        sizes = [len(weight) for weight in self.weights]
        pieces = zip(*(torch.split(t, sizes) for t in (whole.codes, whole.scale, whole.zero)), strict=True)
        return [QuantizedWeight(codes, scale, zero, whole.group, whole.inputs) for codes, scale, zero in pieces]


# quantizes weights that read one input at several schemes that differ in bits alone; per scheme, one result per weight
Solve = Callable[[Linears, Sequence[Scheme]], Sequence[Sequence[StoredWeight | None]]]


@dataclass(frozen=True)
class Method:
    """One quantization method: its function, its bit widths, and the defaults and limits of its settings."""

    solve: Solve
    widths: range = range(1, 9)
    group: int | str = "row"
    symmetric: bool = True
    calibrated: bool = False  # whether it needs statistics of the inputs
    settings: Mapping[str, Setting] = field(default_factory=dict)  # its own settings with their defaults
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # limits of numeric settings
    choices: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)  # allowed values of the others
    fixed: str = ""  # how messages describe a group and grid that cannot be chosen
    latent: bool = False  # whether keys and values are computed from one vector, which is cached in their place
    any_group: bool = False  # whether the group can be chosen although the grid is fixed
    both_paths: bool = False  # whether it needs the inputs in the float model beside those after quantized layers
    fisher: bool = False  # whether it weighs each element of a weight by the gradient of the answer loss
    inputs: Callable[[Tensor, Scheme], Tensor] | None = None  # changes a layer's inputs in each forward pass

    def takes(self, group: int | str, symmetric: bool) -> bool:
        """Whether a scheme may have this group and symmetry."""
        return not self.fixed or (symmetric == self.symmetric and (self.any_group or group == self.group))


def per_weight(quantize: Callable[[Tensor, Scheme], StoredWeight | None]) -> Solve:
    """Turn a function of one weight and one scheme into the function of a Method."""
    return lambda linears, schemes: [[quantize(w.detach(), scheme) for w in linears.weights] for scheme in schemes]


def input_of(weight: Weight) -> str:
    """The name of the input that a weight reads: equal for weights that share their input."""
    return weight.shares_input or weight.reader
