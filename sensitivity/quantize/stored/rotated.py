"""Weights that are stored for rotated inputs, and the rotation itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import QuantizedWeight

SEED = 0


@dataclass(frozen=True)
class RotatedWeight:
    """A weight stored for rotated inputs: x is divided by `inputs`, rotated, and divided by `rotated.inputs`."""

    rotated: QuantizedWeight
    inputs: Tensor | None = None
    block: int | None = None  # channels that are rotated together; None: as many as there can be

    def dequantize(self) -> Tensor:
        """The weight in float32, for inputs that are neither divided nor rotated."""
        weight = rotate_back(self.rotated.dequantize(), self.block)
        return weight if self.inputs is None else weight / self.inputs


@dataclass(frozen=True)
class InputTransform:
    """The transform of a stored weight's inputs before they are rounded, and its inverse."""

    before: Tensor | None = None  # inputs are divided by it before the rotation
    rotates: bool = False
    block: int | None = None  # as in RotatedWeight
    after: Tensor | None = None  # inputs are divided by it after the rotation

    @classmethod
    def of(cls, stored: object, device: torch.device) -> InputTransform | None:
        """The transform of a stored weight's inputs; None where they stay as they are."""
        if isinstance(stored, RotatedWeight):
            return cls(_on(stored.inputs, device), True, stored.block, _on(stored.rotated.inputs, device))
        factor = _on(getattr(stored, "inputs", None), device)
        return None if factor is None else cls(factor)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs as the stored weight reads them, in float32."""
        values = inputs.float() if self.before is None else inputs.float() / self.before
        values = rotate(values, self.block) if self.rotates else values
        return values if self.after is None else values / self.after

    def back(self, values: Tensor) -> Tensor:
        """The inverse of `forward`."""
        values = values if self.after is None else values * self.after
        values = rotate_back(values, self.block) if self.rotates else values
        return values if self.before is None else values * self.before


def _on(factor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if factor is None else factor.to(device)


def rotate(rows: Tensor, block: int | None = None) -> Tensor:
    """Rows times R: random signs, then a Hadamard matrix over blocks of columns.

    The size of a block is the largest power of two that divides the width, or `block` if that is smaller.
    """
    return _hadamard(rows * _signs(rows), block)


def rotate_back(rows: Tensor, block: int | None = None) -> Tensor:
    """The inverse of `rotate`: a Hadamard matrix divided by the root of its width is its own inverse."""
    return _hadamard(rows, block) * _signs(rows)


def _signs(rows: Tensor) -> Tensor:
    width = rows.shape[-1]
    bits = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(SEED + width))
    return (2.0 * bits - 1).to(rows)


def _hadamard(rows: Tensor, most: int | None) -> Tensor:
    """The fast Hadamard transform: each step replaces two numbers `step` apart by their sum and their difference."""
    width = rows.shape[-1]
    block = min(width & -width, most or width)
    sums, step = rows, 1
    while step < block:
        pairs = sums.reshape(*rows.shape[:-1], width // (2 * step), 2, step)
        first, second = pairs.unbind(-2)
        sums, step = torch.stack([first + second, first - second], -2).reshape(rows.shape), 2 * step
    return sums * (1 / math.sqrt(block))
