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

    `zero` is a whole number on the grids that runtimes can store; on those of the method `uniform` it is any number.
    """

    codes: Tensor  # uint8, rows x cols
    scale: Tensor  # float32, with values that 16 bits hold for most methods; 1 x 1, rows x 1 or rows x groups
    zero: Tensor
    group: int  # columns that share a scale
    inputs: Tensor | None = None  # factor on each column before rounding (AWQ); the layer's input is divided by it

    def dequantize(self) -> Tensor:
        """The weight in float32, divided by the factors on its columns."""
        codes, (scale, zero) = _aligned(self.codes.float(), self.group, self.scale, self.zero)
        weight = (codes - zero).mul_(scale).reshape(self.codes.shape)
        return weight if self.inputs is None else weight / self.inputs

    def spread(self, per_group: Tensor) -> Tensor:
        """One value per group, in a shape that broadcasts with the codes."""
        return _spread(per_group, self.group, self.codes.shape[1])


def over_columns(per_group: Tensor, group: int, width: int) -> Tensor:
    """Values per row and group, repeated over the columns of each group; the last group may be shorter."""
    return per_group.repeat_interleave(group, dim=1)[:, :width]


def _spread(per_group: Tensor, group: int, width: int) -> Tensor:
    return per_group if per_group.shape[1] == 1 else over_columns(per_group, group, width)


def _aligned(numbers: Tensor, group: int, *per_group: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`numbers` and values per group in shapes that broadcast; without a short last group nothing is copied."""
    rows, cols = numbers.shape
    if cols % group or all(t.shape[1] == 1 for t in per_group):
        return numbers, [_spread(t, group, cols) for t in per_group]
    return numbers.reshape(rows, -1, group), [t[:, :, None] for t in per_group]


def group_size(scheme: Scheme, weight: Tensor) -> int:
    """How many columns share a scale: all of them where a scheme's group is a row or the tensor."""
    return weight.shape[1] if isinstance(scheme.group, str) else min(scheme.group, weight.shape[1])


def ranges(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each group; every range includes zero."""
    if scheme.group == "tensor":
        grouped = weight.reshape(1, 1, -1)
    else:
        size = group_size(scheme, weight)
        rows, cols = weight.shape
        if padding := -cols % size:  # every range includes zero, so padding with zeros changes none
            weight = torch.nn.functional.pad(weight, (0, padding))
        grouped = weight.reshape(rows, -1, size)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def as_16_bit(values: Tensor, like: torch.dtype) -> Tensor:
    """Values rounded to the 16-bit dtype in which they will be stored, in float32."""
    return values.to(torch.bfloat16 if like == torch.bfloat16 else torch.float16).float()


def scale_as_16_bit(scale: Tensor, like: torch.dtype) -> Tensor:
    """A scale rounded to the 16-bit dtype in which it will be stored, so that what is measured is what is exported."""
    # a group of zeros would get a scale of zero, by which its weights are divided
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
        scale = scale_as_16_bit(2 * _mean_magnitude(weight, scheme, low.shape), dtype)
        return scale, torch.full_like(scale, 0.5)
    if scheme.symmetric:
        scale = scale_as_16_bit(2 * torch.maximum(-low, high) / levels, dtype)
        return scale, torch.full_like(scale, 2.0 ** (scheme.bits - 1))
    scale = scale_as_16_bit((high - low) / levels, dtype)
    return scale, (-low / scale).round().clamp(0, levels)


def _mean_magnitude(weight: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    if scheme.group == "tensor":
        return weight.abs().mean().reshape(shape)
    size = group_size(scheme, weight)
    return torch.stack([chunk.abs().mean(1) for chunk in torch.split(weight, size, dim=1)], dim=1)


def encode(weight: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor, overwrite: bool = False) -> QuantizedWeight:
    """The nearest codes on a given grid; with `overwrite` the weight may be overwritten, which saves memory."""
    group = group_size(scheme, weight)
    numbers, (step, shift) = _aligned(weight, group, scale, zero)
    scaled = numbers.div_(step) if overwrite else numbers / step
    codes = scaled.add_(shift).round_().clamp_(0, 2**scheme.bits - 1)
    return QuantizedWeight(_bytes(codes).reshape(weight.shape), scale, zero, group)


def _bytes(codes: Tensor) -> Tensor:
    """Codes as uint8, converted by NumPy on the CPU: its loop is vectorized, and torch's takes six times as long."""
    if codes.device.type != "cpu":
        return codes.to(torch.uint8)
    return torch.from_numpy(codes.detach().numpy().astype(np.uint8))
