"""Integer grids: the codes, scales and zero points of a weight, and how they become numbers again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensitivity.spec.plan import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on an integer grid: (codes - zero) * scale, with one scale and zero per row or group of columns.

    `zero` is a whole number on the grids that runtimes can store; the paper's uniform grid has any real number.
    """

    codes: Tensor  # uint8, rows x cols
    scale: Tensor  # float32, for most methods with a value that 16 bits hold; 1 x 1, rows x 1 or rows x groups
    zero: Tensor
    group: int  # columns that share a scale
    inputs: Tensor | None = None  # factor on each column before rounding (AWQ); the layer's input is divided by it

    def dequantize(self) -> Tensor:
        """The weight in float32, with the factors of its inputs divided out."""
        codes, (scale, zero) = self._aligned(self.codes.float(), self.scale, self.zero)
        weight = (codes - zero).mul_(scale).reshape(self.codes.shape)
        return weight if self.inputs is None else weight / self.inputs

    def spread(self, per_group: Tensor) -> Tensor:
        """One value per group, repeated over its columns; the last group of a row may be shorter."""
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]

    def _aligned(self, numbers: Tensor, *per_group: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`numbers` and values per group in shapes that broadcast; whole groups need no copy."""
        rows, cols = numbers.shape
        if cols % self.group or all(t.shape[1] == 1 for t in per_group):
            return numbers, [self.spread(t) for t in per_group]
        return numbers.reshape(rows, -1, self.group), [t[:, :, None] for t in per_group]


def columns(scheme: Scheme, weight: Tensor) -> int:
    """How many columns share a scale; without groups, all of them."""
    return weight.shape[1] if isinstance(scheme.group, str) else min(scheme.group, weight.shape[1])


def ranges(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each group; every range includes zero."""
    if scheme.group == "tensor":
        grouped = weight.reshape(1, 1, -1)
    else:
        size = columns(scheme, weight)
        rows, cols = weight.shape
        if padding := -cols % size:  # every range includes zero, so padding with zeros changes none
            weight = torch.nn.functional.pad(weight, (0, padding))
        grouped = weight.reshape(rows, -1, size)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def as_16_bit(values: Tensor, like: torch.dtype) -> Tensor:
    """Values rounded to the 16-bit type in which they will be stored."""
    return values.to(torch.bfloat16 if like == torch.bfloat16 else torch.float16).float()


def to_16_bit(scale: Tensor, like: torch.dtype) -> Tensor:
    """A scale rounded to the 16-bit type in which it will be stored, so that what is measured is what is exported."""
    # a group of zeros has a range of zero, and its scale would divide by zero
    tiny = torch.finfo(torch.bfloat16 if like == torch.bfloat16 else torch.float16).tiny
    return as_16_bit(scale.clamp(min=tiny), like)


def scale_and_zero(
    weight: Tensor, scheme: Scheme, low: Tensor, high: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group for given ranges.

    On symmetric grids the largest magnitude a lies half a step beyond the last code: scale = 2a / (2^b - 1), as in
    GPTQ and compressed-tensors. A symmetric grid of one bit has no zero: its two codes are plus and minus the mean
    magnitude.
    """
    levels = 2**scheme.bits - 1
    if scheme.symmetric and scheme.bits == 1:
        # codes 0 and 1 with zero = 0.5 and scale = 2m give -m and m; the mean magnitude m minimizes the squared error
        scale = to_16_bit(2 * _mean_magnitude(weight, scheme, low.shape), dtype)
        return scale, torch.full_like(scale, 0.5)
    if scheme.symmetric:
        scale = to_16_bit(2 * torch.maximum(-low, high) / levels, dtype)
        return scale, torch.full_like(scale, 2.0 ** (scheme.bits - 1))
    scale = to_16_bit((high - low) / levels, dtype)
    return scale, (-low / scale).round().clamp(0, levels)


def _mean_magnitude(weight: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    if scheme.group == "tensor":
        return weight.abs().mean().reshape(shape)
    size = columns(scheme, weight)
    return torch.stack([chunk.abs().mean(1) for chunk in torch.split(weight, size, dim=1)], dim=1)


def encode(weight: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor, overwrite: bool = False) -> QuantizedWeight:
    """The nearest codes on a given grid; with `overwrite` the weight may be overwritten, which saves memory."""
    group = columns(scheme, weight)
    numbers, (step, shift) = QuantizedWeight(weight, scale, zero, group)._aligned(weight, scale, zero)
    scaled = numbers.div_(step) if overwrite else numbers / step
    codes = scaled.add_(shift).round_().clamp_(0, 2**scheme.bits - 1)
    return QuantizedWeight(_bytes(codes).reshape(weight.shape), scale, zero, group)


def _bytes(codes: Tensor) -> Tensor:
    """Codes as uint8, converted by NumPy on the CPU: its loop is vectorized, and torch's takes six times as long."""
    if codes.device.type != "cpu":
        return codes.to(torch.uint8)
    return torch.from_numpy(codes.detach().numpy().astype(np.uint8))
