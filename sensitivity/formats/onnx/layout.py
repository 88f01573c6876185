"""How ONNX Runtime's MatMulNBits stores a weight: codes of 2, 4 or 8 bits in blocks of a row, scales, zero points."""

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
from sensitivity.spec.stored_bits import onnx_block, openvino_width

FLOATS = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
BYTES = {"UINT8": 1, "FLOAT16": 2, "BFLOAT16": 2, "FLOAT": 4}
CODES, SCALE, ZERO = ":codes", ":scale", ":zero"  # name suffixes of the constants of a quantized weight


@dataclass(frozen=True)
class Constant:
    """A constant of a graph: its name, ONNX's name of its type, and its shape."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * BYTES[self.type]


@dataclass(frozen=True)
class Blocks:
    """How the codes of a weight are stored: each row in blocks, each with one scale; its last block may be padded."""

    rows: int
    cols: int
    width: int  # bits of a code
    size: int  # codes in a block
    scales: tuple[int, int]  # the shape of the stored scales: rows (1 for a whole tensor), and scales in each row

    @classmethod
    def of(cls, weight: Weight, scheme: Scheme) -> Blocks:
        """The blocks of a weight; a block lies within a group, whose scale may hold for several blocks."""
        scales = (weight.rows, 1)
        if not isinstance(scheme.group, str):
            scales = (weight.rows, weight.cols // scheme.group)
        elif scheme.group == "tensor":
            scales = (1, 1)
        size = onnx_block(scheme, weight.cols)
        return cls(weight.rows, weight.cols, openvino_width(scheme.bits), size, scales)

    @property
    def count(self) -> int:
        """How many blocks a row has."""
        return math.ceil(self.cols / self.size)

    @property
    def zero_bytes(self) -> int:
        """The bytes of a row's zero points."""
        return math.ceil(self.count * self.width / 8)


def kept(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Constant:
    """The constant of an unquantized parameter, in the type in which its checkpoint stores it."""
    if dtype not in FLOATS:
        raise UserError(f"{name} is stored as {dtype}, which the onnx format does not hold; use --format fake")
    return Constant(name, FLOATS[dtype], tuple(shape))


def constants(weight: Weight, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Constant, ...]:
    """The constants of one quantized weight; the zero point of symmetric codes is known and not stored."""
    blocks = Blocks.of(weight, scheme)
    codes = (blocks.rows, blocks.count, blocks.size * blocks.width // 8)
    placed = (
        Constant(f"{weight.name}{CODES}", "UINT8", codes),
        Constant(f"{weight.name}{SCALE}", FLOATS[scale_dtype], (*blocks.scales, 1)),
    )
    if scheme.symmetric:
        return placed
    rows, groups = blocks.scales
    # if a row has only one zero point, a byte is filled with it; otherwise the zero point of every block is stored
    return (*placed, Constant(f"{weight.name}{ZERO}", "UINT8", (rows, 1 if groups == 1 else blocks.zero_bytes)))


def contents(stored: QuantizedWeight, weight: Weight, scheme: Scheme, scale_dtype: torch.dtype) -> list[Tensor]:
    """The bytes of each constant that `constants` returns, in the same order."""
    blocks, codes = Blocks.of(weight, scheme), stored.codes
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        assert bool((stored.zero == middle).all()), f"{weight.name} has codes that are not symmetric"
        codes = codes + (2 ** (blocks.width - 1) - middle)  # the zero point that MatMulNBits takes by default
    padded = torch.nn.functional.pad(codes, (0, blocks.count * blocks.size - blocks.cols))
    made = [_packed(padded, blocks.width), stored.scale.to(scale_dtype).contiguous().view(torch.uint8).reshape(-1)]
    return made if scheme.symmetric else [*made, _zeros(stored, blocks)]


def _zeros(stored: QuantizedWeight, blocks: Blocks) -> Tensor:
    """Zero points as packed bytes: one for each block, or, if a row has only one, a byte filled with it."""
    rows, groups = blocks.scales
    zero = stored.zero.to(torch.uint8).reshape(rows, groups)
    repeated = 8 // blocks.width if groups == 1 else blocks.count // groups
    return _packed(zero.repeat_interleave(repeated, dim=1), blocks.width)


def _packed(codes: Tensor, width: int) -> Tensor:
    """Rows of codes as bytes, the first in the lowest bits, each row in whole bytes."""
    count = math.ceil(codes.shape[1] * width / 8)
    words = pack(codes.contiguous(), width)
    return words.view(torch.uint8).reshape(len(codes), -1)[:, :count].contiguous().reshape(-1)
