"""How OpenVINO stores a weight: codes in 2, 4 or 8 bits, a 16-bit scale per group, and zero points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.formats.writing.packing import pack
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import openvino_width

BITS = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}
FLOATS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
CODES, SCALE, ZERO = ":codes", ":scale", ":zero"  # name suffixes of the constants of a quantized weight


@dataclass(frozen=True)
class Constant:
    """A constant of a graph: its name, OpenVINO's name of its type, and its shape."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The bytes that it takes; codes follow each other without gaps, also from row to row."""
        return math.ceil(math.prod(self.shape) * BITS[self.type] / 8)


def kept(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Constant:
    """The constant of an unquantized parameter, in the type in which its checkpoint stores it."""
    if dtype not in FLOATS:
        raise UserError(f"{name} is stored as {dtype}, which the openvino format does not hold; use --format fake")
    return Constant(name, FLOATS[dtype], tuple(shape))


def constants(weight: Weight, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Constant, ...]:
    """The constants of one quantized weight; symmetric codes of 4 and 8 bits are signed and need no zero point."""
    width = openvino_width(scheme.bits)
    signed = scheme.symmetric and width > 2  # there are no signed codes of two bits
    whole, per_group = _shapes(weight, scheme)
    placed = [
        Constant(f"{weight.name}{CODES}", f"{'i' if signed else 'u'}{width}", whole),
        Constant(f"{weight.name}{SCALE}", FLOATS[scale_dtype], per_group),
    ]
    if not signed:
        one = tuple(1 for _ in per_group)
        placed.append(Constant(f"{weight.name}{ZERO}", f"u{width}", one if scheme.symmetric else per_group))
    return tuple(placed)


def contents(stored: QuantizedWeight, weight: Weight, scheme: Scheme, scale_dtype: torch.dtype) -> list[Tensor]:
    """The bytes of each constant that `constants` returns, in the same order."""
    width, middle = openvino_width(scheme.bits), 2 ** (scheme.bits - 1)
    codes, zero = stored.codes, stored.zero.to(torch.uint8)
    if scheme.symmetric:
        assert bool((stored.zero == middle).all()), f"{weight.name} has codes that are not symmetric"
        zero = torch.full((1, 1), middle, dtype=torch.uint8)
        if width > 2:  # two's complement in `width` bits; unsigned bytes wrap around
            codes = (codes - middle) & (2**width - 1)
    made = [_packed(codes, width), stored.scale.to(scale_dtype).contiguous().view(torch.uint8).reshape(-1)]
    return [*made, _packed(zero, width)] if not scheme.symmetric or width == 2 else made


def _shapes(weight: Weight, scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the codes, and the shape of the scales (one per group)."""
    if isinstance(scheme.group, str):
        return (weight.rows, weight.cols), (1 if scheme.group == "tensor" else weight.rows, 1)
    group = min(scheme.group, weight.cols)
    count = weight.cols // group
    return (weight.rows, count, group), (weight.rows, count, 1)


def _packed(codes: Tensor, width: int) -> Tensor:
    """Codes as bytes, the first in the lowest bits."""
    count = math.ceil(codes.numel() * width / 8)
    return pack(codes.reshape(1, -1), width).view(torch.uint8).reshape(-1)[:count]
