"""Codes of 1 to 8 bits, packed without gaps into 32-bit words, row by row, and unpacked again."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 2**18  # codes at a time, so that all intermediate values stay in a core's cache
Bytes = NDArray[np.uint8]


def pack(codes: Tensor, bits: int) -> Tensor:
    """rows x cols of uint8 to rows x ceil(cols * bits / 32) of int32; the first code is in the lowest bits."""
    rows, cols = codes.shape
    words = math.ceil(cols * bits / 32)
    if cols % 32:  # whole groups of 32 codes are whole words
        codes = torch.nn.functional.pad(codes, (0, -cols % 32))
    flat = codes.contiguous().reshape(-1).numpy()
    packed = np.empty(len(flat) // 8 * bits, np.uint8)

    def piece(start: int) -> None:
        _gather(flat[start : start + PIECE], bits, packed[start // 8 * bits : (start + PIECE) // 8 * bits])

    starts = range(0, len(flat), PIECE)
    if len(starts) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy lets others run while it computes
            list(threads.map(piece, starts))
    else:
        for start in starts:
            piece(start)
    return torch.from_numpy(packed).reshape(rows, -1).view(torch.int32)[:, :words].contiguous()


def _gather(codes: Bytes, bits: int, out: Bytes) -> None:
    """Eight codes are eight bytes, one word; three times neighbours close up, and its lowest bytes are full."""
    if bits == 8:
        out[:] = codes
    elif bits == 4:  # the commonest width: two codes are one 16-bit word, whose high byte moves down by four bits
        pairs = codes.view(np.uint16)
        moved = pairs >> np.uint16(4)
        moved |= pairs
        np.copyto(out, moved, casting="unsafe")
    else:
        word = codes.view(np.uint64)
        for lane in (8, 16, 32):
            low = _repeat((1 << bits * lane // 8) - 1, 2 * lane)
            high = word >> np.uint64(lane - bits * lane // 8)
            high &= np.uint64(low << bits * lane // 8)
            word = word & np.uint64(low)
            word |= high
        out.reshape(-1, bits)[:] = word.view(np.uint8).reshape(-1, 8)[:, :bits]


def _repeat(mask: int, every: int) -> int:
    return sum(mask << shift for shift in range(0, 64, every))


def unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    """The codes again, as uint8."""
    rows = len(words)
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).contiguous()  # 32 codes are `bits` words
    octets = padded.view(torch.uint8).reshape(-1, bits)
    word = torch.zeros(len(octets), 8, dtype=torch.uint8)
    word[:, :bits] = octets
    codes = word.view(torch.int64).reshape(-1, 1) >> torch.arange(0, 8 * bits, bits) & (1 << bits) - 1
    return codes.to(torch.uint8).reshape(rows, -1)[:, :cols]
