"""Packs codes of 1 to 8 bits without gaps into 32-bit words, row by row, and unpacks them."""

from __future__ import annotations

import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CODES_AT_ONCE = 2**18  # so few that intermediate values fit a core's cache, and their memory is reused
Bytes = NDArray[np.uint8]
SMALLEST_BUFFER = 2**22  # bytes; a smaller buffer is not worth keeping
FREE_BUFFERS: list[Bytes] = []  # buffers that no tensor uses at the moment, the latest first
MAX_FREE_BUFFERS = 6
# reentrant, since garbage collection may give a buffer back at any moment, also in the thread that holds the lock
LOCK = threading.RLock()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack rows x cols codes (uint8) into rows x ceil(cols * bits / 32) words (int32).

    The first code is in the lowest bits. Codes of 8 bits are already packed: the same memory is viewed as words.
    """
    rows, cols = codes.shape
    words = math.ceil(cols * bits / 32)
    if cols % 32:  # 32 codes of any width fill whole words
        codes = torch.nn.functional.pad(codes, (0, -cols % 32))
    if bits == 8:
        return codes.reshape(-1).view(torch.int32).reshape(rows, -1)[:, :words].contiguous()
    flat = codes.contiguous().reshape(-1).numpy()
    packed = reused_buffer(len(flat) // 8 * bits).numpy()

    def piece(start: int) -> None:
        _gather(
            flat[start : start + CODES_AT_ONCE], bits, packed[start // 8 * bits : (start + CODES_AT_ONCE) // 8 * bits]
        )

    starts = range(0, len(flat), CODES_AT_ONCE)
    if len(starts) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy releases the GIL while it computes
            list(threads.map(piece, starts))
    else:
        for start in starts:
            piece(start)
    packed_words = torch.from_numpy(packed).reshape(rows, -1).view(torch.int32)
    return packed_words if packed_words.shape[1] == words else packed_words[:, :words].contiguous()


def reused_buffer(count: int) -> Tensor:
    """An uninitialized byte tensor to pack codes into; it reuses the memory of an earlier one if possible.

    To get new memory from the operating system takes longer. A buffer is free again when the last tensor that views it
    is deleted.
    """
    if count < SMALLEST_BUFFER:
        return torch.empty(count, dtype=torch.uint8)
    with LOCK:
        # at most twice as large, so that a small tensor does not occupy a large buffer
        fitting = [memory for memory in FREE_BUFFERS if count <= len(memory) <= 2 * count]
        if fitting:
            memory = min(fitting, key=len)
            FREE_BUFFERS[:] = [other for other in FREE_BUFFERS if other is not memory]
        else:
            memory = np.empty(count, np.uint8)
    part = memory[:count]
    # torch keeps `part` alive until the last view of the tensor is gone, so `part` is freed after the last use
    weakref.finalize(part, _give_back, memory).atexit = False
    return torch.from_numpy(part)


def _give_back(memory: Bytes) -> None:
    with LOCK:
        FREE_BUFFERS.insert(0, memory)
        del FREE_BUFFERS[MAX_FREE_BUFFERS:]


def _gather(codes: Bytes, bits: int, out: Bytes) -> None:
    """Pack codes, whose number must be a multiple of 32, without a loop over codes.

    Up to 4 bits, codes are merged in pairs: two bytes are one uint16, whose high code moves down beside the low one,
    and the pair is a code of twice the width. For 5 to 7 bits, eight codes are one uint64. In three steps, groups of 1,
    2 and 4 codes move down beside the group below, until the lowest `bits` bytes of the word hold all eight codes.
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
        # xor clears the high lanes; the first time into a new array, since `word` still views the caller's codes
        word = np.bitwise_xor(word, high, out=None if lane == 8 else word)
        high >>= np.uint64(lane - full)
        word |= high
    octets = word.view(np.uint8)
    for place in range(bits):  # the lowest bytes of each word, close together
        out[place::bits] = octets[place::8]


def _repeat(mask: int, every: int) -> int:
    """A mask repeated through a 64-bit word, once every `every` bits."""
    return sum(mask << shift for shift in range(0, 64, every))


def unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    """The codes of packed words, as uint8."""
    rows = len(words)
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).contiguous()  # 32 codes are `bits` words
    octets = padded.view(torch.uint8).reshape(-1, bits)
    word = torch.zeros(len(octets), 8, dtype=torch.uint8)
    word[:, :bits] = octets
    codes = word.view(torch.int64).reshape(-1, 1) >> torch.arange(0, 8 * bits, bits) & (1 << bits) - 1
    return codes.to(torch.uint8).reshape(rows, -1)[:, :cols]
