"""Codes of 1 to 8 bits, packed without gaps into 32-bit words, row by row, and unpacked again."""

from __future__ import annotations

import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 2**18  # codes at a time: intermediate values stay in a core's cache, and in memory that is used again
Bytes = NDArray[np.uint8]
LARGE = 2**22  # bytes
ROOMS: list[Bytes] = []  # that nobody looks at
KEPT = 6
LOCK = threading.RLock()  # a tensor may be given back at any moment, by any thread


def pack(codes: Tensor, bits: int) -> Tensor:
    """rows x cols of uint8 to rows x ceil(cols * bits / 32) of int32; the first code is in the lowest bits.

    Codes of eight bits are packed as they are: then the same memory is looked at as words.
    """
    rows, cols = codes.shape
    words = math.ceil(cols * bits / 32)
    if cols % 32:  # whole groups of 32 codes are whole words
        codes = torch.nn.functional.pad(codes, (0, -cols % 32))
    if bits == 8:
        return codes.reshape(-1).view(torch.int32).reshape(rows, -1)[:, :words].contiguous()
    flat = codes.contiguous().reshape(-1).numpy()
    packed = fresh(len(flat) // 8 * bits).numpy()

    def piece(start: int) -> None:
        _gather(flat[start : start + PIECE], bits, packed[start // 8 * bits : (start + PIECE) // 8 * bits])

    starts = range(0, len(flat), PIECE)
    if len(starts) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy lets others run while it computes
            list(threads.map(piece, starts))
    else:
        for start in starts:
            piece(start)
    found = torch.from_numpy(packed).reshape(rows, -1).view(torch.int32)
    return found if found.shape[1] == words else found[:, :words].contiguous()


def fresh(count: int) -> Tensor:
    """Bytes with any content, in memory that an earlier layer had if there is any: new memory takes longer to get.

    Memory comes back when the last tensor that looks at it is gone.
    """
    if count < LARGE:
        return torch.empty(count, dtype=torch.uint8)
    with LOCK:
        fitting = [room for room in ROOMS if count <= len(room) <= 2 * count]
        if fitting:
            room = min(fitting, key=len)
            ROOMS[:] = [other for other in ROOMS if other is not room]
        else:
            room = np.empty(count, np.uint8)
    part = room[:count]
    weakref.finalize(part, _back, room).atexit = False
    return torch.from_numpy(part)


def _back(room: Bytes) -> None:
    with LOCK:
        ROOMS.insert(0, room)
        del ROOMS[KEPT:]


def _gather(codes: Bytes, bits: int, out: Bytes) -> None:
    """Eight codes are eight bytes, one word; three times neighbors close up, and its lowest bytes are full.

    As long as two codes fit into a byte there is a shorter way: two bytes are a word, whose high one moves down.
    """
    while bits <= 4:
        pairs = codes.view(np.uint16)
        moved = pairs >> np.uint16(8 - bits)
        moved |= pairs
        bits *= 2
        codes = out if bits == 8 else np.empty(len(pairs), np.uint8)
        np.copyto(codes, moved, casting="unsafe")
    if bits == 8:
        return
    word, high = codes.view(np.uint64), np.empty(len(codes) // 8, np.uint64)
    for lane in (8, 16, 32):  # each lane moves to where the one below it ends
        full = bits * lane // 8
        np.bitwise_and(word, np.uint64(_repeat((1 << full) - 1, 2 * lane) << lane), out=high)
        word = np.bitwise_xor(word, high, out=None if lane == 8 else word)
        high >>= np.uint64(lane - full)
        word |= high
    octets = word.view(np.uint8)
    for place in range(bits):  # the lowest bytes of each word, close together
        out[place::bits] = octets[place::8]


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
