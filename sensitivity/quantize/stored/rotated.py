"""Weights behind a rotation of their inputs, and the rotation itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.stored.grid import QuantizedWeight

SEED = 0


@dataclass(frozen=True)
class RotatedWeight:
    """A weight that is stored for rotated inputs."""

    turned: QuantizedWeight

    def dequantize(self) -> Tensor:
        """The weight in float32, for the inputs as they are."""
        return rotate_back(self.turned.dequantize())


def rotate(rows: Tensor) -> Tensor:
    """Rows times R: random signs, then a Hadamard matrix over blocks of the largest power of two in the width."""
    return _hadamard(rows * _signs(rows))


def rotate_back(rows: Tensor) -> Tensor:
    """Rows times R': a Hadamard matrix over the root of its width is its own inverse."""
    return _hadamard(rows) * _signs(rows)


def _signs(rows: Tensor) -> Tensor:
    width = rows.shape[-1]
    bits = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(SEED + width))
    return (2.0 * bits - 1).to(rows)


def _hadamard(rows: Tensor) -> Tensor:
    """The fast transform: in each step, pairs at a distance become their sum and their difference."""
    width = rows.shape[-1]
    block = width & -width
    sums, step = rows, 1
    while step < block:
        pairs = sums.reshape(*rows.shape[:-1], width // (2 * step), 2, step)
        first, second = pairs.unbind(-2)
        sums, step = torch.stack([first + second, first - second], -2).reshape(rows.shape), 2 * step
    return sums * (1 / math.sqrt(block))
