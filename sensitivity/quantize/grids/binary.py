"""Binary weights: a sign times a magnitude per group, and the same again for each residual (residual binary)."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import as_16_bit, group_size
from sensitivity.quantize.stored.levels import PlanesWeight
from sensitivity.spec.plan import Scheme


def quantize_binary(weight: Tensor, scheme: Scheme) -> PlanesWeight:
    """Each bit is one more binary approximation of the residual, mean + magnitude x sign, per row and group.

    This is the residual approximation of Li et al. 2021 as in BiLLM's code, which was read: every order has a mean.
    """
    values, group = weight.float(), group_size(scheme, weight)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % group)).reshape(len(values), -1, group)
    mask = torch.nn.functional.pad(torch.ones_like(values[:1]), (0, -values.shape[1] % group)).reshape(1, -1, group)
    mean, magnitudes, codes = residual(padded, mask, scheme.bits, weight.dtype)
    # mean + a s with s = -1 or 1 is (mean - a) + 2a b with b = 0 or 1: a sum of 16-bit numbers
    slopes = as_16_bit(2 * magnitudes, weight.dtype)
    offset = as_16_bit(mean - slopes.sum(2) / 2, weight.dtype)
    bits = codes.reshape(len(values), -1)[:, : values.shape[1]].contiguous()
    return PlanesWeight(bits, torch.cat([offset[..., None], slopes], 2), group)


def residual(x: Tensor, mask: Tensor, order: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (...), magnitudes (... x order) and codes of the elements of the last dimension under a mask (1 or 0).

    Bit k of a code is the sign of the residual that the orders before k leave.
    """
    count = mask.sum(-1).clamp(min=1)
    codes, left, total = torch.zeros_like(x, dtype=torch.uint8), x * mask, torch.zeros_like(x[..., 0])
    magnitudes: list[Tensor] = []
    for k in range(order):
        mean = left.sum(-1) / count
        centered = (left - mean[..., None]) * mask
        magnitude = as_16_bit(centered.abs().sum(-1) / count, dtype)
        positive = centered >= 0
        codes |= positive.to(torch.uint8) << k
        left = (centered - torch.where(positive, magnitude[..., None], -magnitude[..., None])) * mask
        total = total + mean
        magnitudes.append(magnitude)
    return as_16_bit(total, dtype), torch.stack(magnitudes, -1), codes
