"""How GGUF stores a weight: blocks of 32 codes with a 16-bit scale, of the types Q4_0, Q5_0 and Q8_0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.errors import UserError
from sensitivity.spec.stored_bits import GGUF_BLOCK, GGUF_BLOCK_BYTES

VALUES_AT_ONCE = 2**22  # few, so that intermediate values take little memory
Bytes = NDArray[np.uint8]


def _nibbles(values: NDArray[np.int8], offset: int) -> tuple[Bytes, Bytes]:
    """Values plus an offset that makes them positive, and the low four bits of these, two per byte."""
    positive = (values + np.int8(offset)).astype(np.uint8)
    low = positive & 15
    half = GGUF_BLOCK // 2
    both: Bytes = (low[:, :half] | low[:, half:] << 4).astype(np.uint8)
    return positive, both


def _q4_0(scale: Bytes, values: NDArray[np.int8]) -> Bytes:
    return np.concatenate([scale, _nibbles(values, 8)[1]], axis=1)


def _q5_0(scale: Bytes, values: NDArray[np.int8]) -> Bytes:
    positive, low = _nibbles(values, 16)
    return np.concatenate([scale, np.packbits(positive >> 4, axis=1, bitorder="little"), low], axis=1)


def _q8_0(scale: Bytes, values: NDArray[np.int8]) -> Bytes:
    return np.concatenate([scale, values.view(np.uint8)], axis=1)


# type -> the smallest and largest value of a code, and the function that makes blocks of scales and codes
TYPES: dict[str, tuple[int, int, Callable[[Bytes, NDArray[np.int8]], Bytes]]] = {
    "q4_0": (-8, 7, _q4_0),
    "q5_0": (-16, 15, _q5_0),
    "q8_0": (-128, 127, _q8_0),
}


def packed(name: str, stored: QuantizedWeight, type: str, order: Tensor | None = None) -> Tensor:
    """The bytes of a quantized weight, with its rows in another order if one is given.

    Blocks have no zero point, so each code is stored minus its zero point, for which the type must be wide enough. A
    type with a minimum, such as Q4_1, would round the product of scale and zero point to 16 bits.
    """
    codes, scale, zero = stored.codes, per_block(stored, stored.scale), per_block(stored, stored.zero)
    half = scale.half()
    if not torch.equal(half.float(), scale.float()):
        raise UserError(
            f"{name} has scales that 16-bit floats do not hold, and GGUF takes no others; sweep with --dtype float16"
        )
    if order is not None:
        codes, half, zero = codes[order], half[order], zero[order]
    out = torch.empty(codes.numel() // GGUF_BLOCK * GGUF_BLOCK_BYTES[type], dtype=torch.uint8)
    blocks, step = out.numpy().reshape(-1, GGUF_BLOCK_BYTES[type]), max(VALUES_AT_ONCE // codes.shape[1], 1)
    begin = 0
    for some, scales, zeros in zip(*(torch.split(one, step) for one in (codes, half, zero)), strict=True):
        made = _blocks(name, some, scales, zeros, type)
        blocks[begin : begin + len(made)] = made
        begin += len(made)
    return out


def _blocks(name: str, codes: Tensor, scale: Tensor, zero: Tensor, type: str) -> Bytes:
    """The blocks of some rows."""
    least, most, joined = TYPES[type]
    values = codes.reshape(-1, GGUF_BLOCK).to(torch.int16) - zero.reshape(-1, 1).to(torch.int16)
    low, high = (int(end) for end in torch.aminmax(values))
    if low < least or high > most:
        raise UserError(f"{name} has codes from {low} to {high}, and {type.upper()} holds {least} to {most}")
    return joined(scale.contiguous().reshape(-1, 1).view(torch.uint8).numpy(), values.to(torch.int8).numpy())


def per_block(stored: QuantizedWeight, per_group: Tensor) -> Tensor:
    """One value for each block, from one per group, row or tensor."""
    rows, cols = stored.codes.shape
    blocks = cols // GGUF_BLOCK
    return per_group.repeat_interleave(blocks // per_group.shape[1], dim=1).expand(rows, blocks)
