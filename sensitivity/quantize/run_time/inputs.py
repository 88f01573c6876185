"""Rounds a layer's inputs: with a scale for each token, or with ranges from calibration."""

from __future__ import annotations

import torch
from torch import Tensor

# which inputs share a scale: those of a token; all of a layer; or those of a channel if the layer reads the output of a
# norm, else all of the layer
TOKEN, TENSOR, NORM = "token", "tensor", "norm"
# Q-VLM: a range per channel, or per token in a vision tower. BLOCKS clips it by a search over blocks of layers, as the
# paper says. RELEASED clips it layer by layer, as the released code does; output and down projections have a range per
# token.
BLOCKS, RELEASED = "blocks", "released"
SCALES = (TOKEN, TENSOR, NORM, BLOCKS, RELEASED)


def round_inputs(inputs: Tensor, bits: int, largest: Tensor | None = None) -> Tensor:
    """Inputs rounded to `bits`, in their own dtype.

    The largest magnitude a lies half a step beyond the last code: scale = 2a / (2^b - 1), as for symmetric weights
    and in compressed-tensors. By default each token has its own a, so that its values depend on no other token.
    `largest` is one a for all tokens, from calibration; larger inputs are clipped.
    """
    values = inputs.float()
    reach = values.abs().amax(-1, keepdim=True) if largest is None else largest.to(values)
    scale = 2 * reach / (2**bits - 1)
    # all inputs of a token may be zero, and then any scale keeps them
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    half = 2 ** (bits - 1)
    return ((values / scale).round_().clamp_(-half, half - 1) * scale).to(inputs.dtype)


def round_between(inputs: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Inputs rounded to 2^b levels from `low` <= 0 to `high` >= 0, in their own dtype; zero is a level.

    `low` and `high` are one number, one per channel, or one per token.
    """
    values, codes = inputs.float(), 2**bits - 1
    low, high = low.to(values), high.to(values)
    scale = (high - low) / codes
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round()
    return (((values / scale).round_() + zero).clamp(min=0, max=codes).sub_(zero) * scale).to(inputs.dtype)


def percentiles(values: Tensor, share: float, dim: int) -> tuple[Tensor, Tensor]:
    """The quantiles 1 - `share` and `share` along a dimension, moved where necessary so that zero lies between them."""
    count = values.shape[dim]
    ordered = values.float().sort(dim).values
    index = round((1 - share) * (count - 1))
    low, high = ordered.narrow(dim, index, 1), ordered.narrow(dim, count - 1 - index, 1)
    return low.clamp(max=0), high.clamp(min=0)


def round_each_token(inputs: Tensor, bits: int, share: float = 1.0, shrink: float = 1.0) -> Tensor:
    """Inputs rounded between quantiles of their own token, both multiplied by `shrink`."""
    low, high = percentiles(inputs, share, -1)
    return round_between(inputs, bits, low * shrink, high * shrink)
