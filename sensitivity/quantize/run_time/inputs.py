"""Rounds a layer's inputs: symmetric, with a scale for each token, or one for all from calibration."""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN, TENSOR = "token", "tensor"  # what shares a scale
SCALES = (TOKEN, TENSOR)


def round_inputs(inputs: Tensor, bits: int, largest: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """Inputs rounded to `bits`, in their own type.

    The largest magnitude a lies half a step beyond the last code: scale = 2a / (2^b - 1), as of symmetric weights and
    in compressed-tensors. By default a is that of each token, so that a token's values depend on no other token.
    `largest` is one magnitude for all, from calibration; what exceeds it is clipped.

    `factor` is what the layer before takes over of a scale search: inputs arrive divided by it, and are rounded so.
    """
    values = inputs.float() if factor is None else inputs.float() / factor
    reach = values.abs().amax(-1, keepdim=True) if largest is None else largest.to(values)
    scale = 2 * reach / (2**bits - 1)
    # all inputs of a token may be zero, and then any scale keeps them
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    half = 2 ** (bits - 1)
    rounded = (values / scale).round_().clamp_(-half, half - 1) * scale
    return (rounded if factor is None else rounded * factor).to(inputs.dtype)
