"""Methods that need only the weight: round to nearest, and the uniform grid of Gautam et al. 2025."""

from __future__ import annotations

from torch import Tensor

from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, ranges, scale_and_zero
from sensitivity.spec.plan import Scheme


def quantize_rtn(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest on a symmetric or asymmetric grid per tensor, row or group."""
    values = weight.float()
    low, high = ranges(values, scheme)
    return encode(
        values, scheme, *scale_and_zero(values, scheme, low, high, weight.dtype), overwrite=values is not weight
    )


def quantize_uniform(weight: Tensor, scheme: Scheme) -> QuantizedWeight | None:
    """Round on a min-max grid over the whole tensor; None for a constant tensor, which is left unchanged.

    Gautam et al., "Towards Understanding Best Practices for Quantization of Vision-Language Models", 2025: the
    smallest and the largest weight are levels of the grid, so zero itself usually is not.
    """
    values = weight.float()
    low, high = values.amin().reshape(1, 1), values.amax().reshape(1, 1)
    scale = (high - low) / (2**scheme.bits - 1)
    if not scale > 0:
        return None
    return encode(values, scheme, scale, -low / scale)
