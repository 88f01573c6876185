"""Methods that look at the weight alone: round to nearest, and the paper's uniform k-bit grid."""

from __future__ import annotations

from torch import Tensor

from sensitivity.quantize.grid import QuantizedWeight, affine, encode, ranges
from sensitivity.spec.plan import Scheme


def rtn(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest per tensor, row or group; symmetric or asymmetric."""
    values = weight.float()
    low, high = ranges(values, scheme)
    return encode(values, scheme, *affine(values, scheme, low, high, weight.dtype), spare=values is not weight)


def uniform(weight: Tensor, scheme: Scheme) -> QuantizedWeight | None:
    """Min-max over the whole tensor with a free zero; None for a constant tensor, which is left as it is.

    Gautam et al., "Towards Understanding Best Practices for Quantization of Vision-Language Models", 2025: the
    smallest and largest weight are levels, so zero itself usually is not.
    """
    values = weight.float()
    low, high = values.amin().reshape(1, 1), values.amax().reshape(1, 1)
    scale = (high - low) / (2**scheme.bits - 1)
    if not scale > 0:
        return None
    return encode(values, scheme, scale, -low / scale)
