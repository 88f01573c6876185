"""LLM.int8: weights in eight bits per row, and inputs in eight bits per token but for the outliers among them."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.grid import QuantizedWeight
from sensitivity.spec.plan import Scheme

LEVELS = 127


def int8_rows(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Largest magnitude of each row / 127 (Dettmers et al. 2022); -128 is not used."""
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    codes = (values / scale).round() + LEVELS + 1
    return QuantizedWeight(codes.to(torch.uint8), scale, torch.full_like(scale, LEVELS + 1), values.shape[1])


def split_inputs(inputs: Tensor, scheme: Scheme) -> Tensor:
    """Inputs as the eight-bit product sees them, those at or above the threshold as they are; at 0 there is none.

    The real thing keeps a whole column if any token of the call reaches the threshold there (`outliers` = "call").
    Then an answer depends on what else is in its batch; "token" keeps only the token's own outliers, and it does not.
    """
    values = inputs.float()
    outlier = values.abs() >= (float(scheme["threshold"] or 0) or float("inf"))
    largest = values.masked_fill(outlier, 0).abs().amax(-1, keepdim=True)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    rounded = (values / scale).round().clamp(-LEVELS, LEVELS) * scale
    if scheme["outliers"] == "call":
        outlier = outlier.flatten(0, -2).any(0)
    return torch.where(outlier, values, rounded).to(inputs.dtype)
