"""LLM.int8: weights in 8 bits per row, inputs in 8 bits per token with outliers in full precision."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.plan import Scheme

LEVELS = 127


def int8_rows(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize each row with scale = its largest magnitude / 127 (Dettmers et al. 2022); -128 is not used."""
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    # codes are stored as uint8, so the signed range -127..127 is moved to 1..255 with a zero point of 128
    codes = (values / scale).round() + LEVELS + 1
    return QuantizedWeight(codes.to(torch.uint8), scale, torch.full_like(scale, LEVELS + 1), values.shape[1])


def split_inputs(inputs: Tensor, scheme: Scheme) -> Tensor:
    """Round inputs to 8 bits per token, as the int8 product does, and keep outliers in full precision.

    An input whose magnitude reaches the threshold is an outlier; a threshold of 0 means that there are no outliers.

    With `outliers` = "call", as in bitsandbytes, one outlier keeps its whole column for every token of the call, so
    that an answer depends on the rest of its batch. With "token" each token keeps only its own outliers, and
    batching changes nothing.
    """
    values = inputs.float()
    outlier = values.abs() >= (float(scheme["threshold"] or 0) or float("inf"))
    largest = values.masked_fill(outlier, 0).abs().amax(-1, keepdim=True)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    rounded = (values / scale).round().clamp(-LEVELS, LEVELS) * scale
    if scheme["outliers"] == "call":
        outlier = outlier.flatten(0, -2).any(0)
    return torch.where(outlier, values, rounded).to(inputs.dtype)
