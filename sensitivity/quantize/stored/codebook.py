"""NF4 and FP4: each element of a weight becomes a number from a fixed table times the absmax of its block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.spec.plan import Scheme

# Dettmers et al. 2023 (QLoRA), appendix E: quantiles of the normal distribution, with exactly -1, 0 and 1 among them
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# bitsandbytes' 4-bit float: a sign, and one of 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1
_HALF = (0.005208333333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
FP4 = (*(-x for x in reversed(_HALF)), 0.0, *_HALF)
TABLES = {"nf4": NF4, "fp4": FP4}
NESTED = 256  # with double quantization, this many block scales share one scale of their own


@dataclass(frozen=True)
class CodebookWeight:
    """A weight stored as indices into a table, and one scale per block of the flattened weight."""

    codes: Tensor  # uint8, blocks x block
    table: Tensor
    scale: Tensor  # one per block, dequantized where double quantization stores it in 8 bits
    shape: torch.Size

    def dequantize(self) -> Tensor:
        """The weight in float32; the padding of the last block is cut off."""
        flat = (self.table[self.codes.long()] * self.scale[:, None]).reshape(-1)
        return flat[: self.shape.numel()].reshape(self.shape)


def to_codebook(weight: Tensor, scheme: Scheme) -> CodebookWeight:
    """Round each element to the nearest number of the table; with `double`, block scales take 8 bits instead of 32."""
    table = torch.tensor(TABLES[scheme.method], device=weight.device)
    size = int(scheme.group)
    flat = weight.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
    largest = blocks.abs().amax(1)
    unit = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    # the midpoints between neighbors of the sorted table separate them, so bucketize gives the index of the nearest one
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return CodebookWeight(codes, table, _nested(largest) if scheme["double"] else largest, weight.shape)


def _nested(scale: Tensor) -> Tensor:
    """Double quantization: scales minus their mean, in blocks of 256, rounded to bitsandbytes' 8-bit dynamic table."""
    # scales are all positive; without their mean they use both signs of the table
    mean = scale.mean()
    table = dynamic_table().to(scale.device)
    blocks = torch.nn.functional.pad(scale - mean, (0, -len(scale) % NESTED)).reshape(-1, NESTED)
    largest = blocks.abs().amax(1, keepdim=True)
    unit = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)
    rounded = table[torch.bucketize(unit, (table[1:] + table[:-1]) / 2)] * largest
    return rounded.reshape(-1)[: len(scale)] + mean


def dynamic_table() -> Tensor:
    """The signed 8-bit table with a variable exponent (Dettmers 2015): decades from 10^-6 to 1.

    Each decade has twice as many numbers as the one below it. The numbers are the midpoints of equal steps from 0.1
    to 1, times the decade; 0 and 1 are added.
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        numbers += [*middles, *(-m for m in middles)]
    return torch.tensor(sorted(numbers))
