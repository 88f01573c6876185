"""AdpQ: the largest elements of a weight get an integer grid of their own in each group."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.grids.outliers import largest
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, ranges, scale_and_zero
from sensitivity.quantize.stored.sparse import TwoScaleWeight
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import outlier_count


def quantize_adpq(weight: Tensor, scheme: Scheme) -> TwoScaleWeight | QuantizedWeight:
    """Round on two grids of the same width per group, one for outliers and one for the others, without data.

    Known from the abstract and two third-party implementations. As in one of them, the adaptive LASSO keeps elements
    with |w| - lambda / |w| > 0 as outliers, with lambda such that they are 6 %; these are the largest 6 % by magnitude
    (inferred, and checked). The other, which is not followed, takes a threshold per group from the median deviation and
    keeps outliers in full precision.
    """
    values = weight.float()
    mask = largest(values.abs(), outlier_count(scheme["outliers"], *weight.shape))

    def on_grid(some: Tensor) -> QuantizedWeight:
        return encode(values, scheme, *scale_and_zero(some, scheme, *ranges(some, scheme), weight.dtype))

    # every range includes zero, so zeros in place of the other grid's elements do not widen it
    inliers = on_grid(values.masked_fill(mask, 0))
    if not bool(mask.any()):
        return inliers
    others = on_grid(values.masked_fill(~mask, 0))
    codes = torch.where(mask, others.codes, inliers.codes)
    whole = QuantizedWeight(codes, inliers.scale, inliers.zero, inliers.group)
    return TwoScaleWeight(whole, others.scale, others.zero, mask.reshape(-1).nonzero().flatten())
