"""Weights with outliers: a few elements that are stored apart from the others, each with its position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.weight import StoredWeight


@dataclass(frozen=True)
class SparseWeight:
    """A stored weight with some elements replaced by 16-bit values."""

    base: StoredWeight
    index: Tensor  # int64 positions in the flattened weight, rising
    values: Tensor  # float32, with values that 16 bits hold

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        weight = self.base.dequantize().contiguous()
        weight.view(-1)[self.index] = self.values
        return weight


@dataclass(frozen=True)
class TwoScaleWeight:
    """A weight on two integer grids per group: one for most elements, a coarser one for outliers."""

    base: QuantizedWeight  # the codes of all elements, and the grid of those that are not outliers
    scale: Tensor  # of outliers, in the shape of the other scales
    zero: Tensor
    index: Tensor  # int64 positions of outliers in the flattened weight, rising

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        weight = self.base.dequantize().contiguous()
        scale, zero = (self.base.spread(t).expand_as(weight).reshape(-1)[self.index] for t in (self.scale, self.zero))
        weight.view(-1)[self.index] = (self.base.codes.reshape(-1)[self.index] - zero) * scale
        return weight
