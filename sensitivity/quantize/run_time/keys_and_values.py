"""Rounds keys and values token by token, as a quantized cache stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import as_16_bit, scale_as_16_bit


def round_cached(vectors: Tensor, bits: int, group: int) -> Tensor:
    """Keys or values rounded to `bits` along their last dimension, in their own dtype.

    Each group of channels of one token has a scale and a smallest value in 16 bits, as KIVI (Liu et al. 2024) does for
    values. No token depends on another: the result is the same, bit for bit, whether tokens were read together, one by
    one, or from a cache.
    """
    width = vectors.shape[-1]
    # a short last group repeats its last channel, which widens no range
    values = torch.cat([vectors, vectors[..., -1:].expand(*vectors.shape[:-1], -width % group)], dim=-1).float()
    grouped = values.reshape(*vectors.shape[:-1], -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    least = as_16_bit(low, vectors.dtype)
    scale = scale_as_16_bit((high - low) / (2**bits - 1), vectors.dtype)
    codes = ((grouped - least) / scale).round_().clamp_(0, 2**bits - 1)
    rounded = (codes * scale + least).reshape(values.shape)
    return rounded[..., :width].to(vectors.dtype)
