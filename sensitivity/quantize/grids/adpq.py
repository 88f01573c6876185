"""AdpQ: the largest numbers of a weight get an integer grid of their own in each group."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.grids.outliers import largest
from sensitivity.quantize.stored.grid import QuantizedWeight, encode, ranges, scale_and_zero
from sensitivity.quantize.stored.sparse import TwoScaleWeight
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import outliers


def adpq(weight: Tensor, scheme: Scheme) -> TwoScaleWeight | QuantizedWeight:
    """Two grids per group, for outliers and for all others, both of the same few bits; no data is needed.

    Known from the abstract and two third-party implementations: the adaptive LASSO keeps |w| - lambda / |w| > 0, with
    lambda such that 6 % are outliers. These are the largest 6 % by magnitude (inferred, and checked). Another
    implementation, which is not followed, takes a threshold per group from the median deviation and keeps outliers in
    full precision.
    """
    values = weight.float()
    mask = largest(values.abs(), outliers(scheme["outliers"], *weight.shape))

    def on_grid(some: Tensor) -> QuantizedWeight:
        return encode(values, scheme, *scale_and_zero(some, scheme, *ranges(some, scheme), weight.dtype))

    # every range includes zero, so zeros in place of the other grid's numbers do not widen it
    inliers = on_grid(values.masked_fill(mask, 0))
    if not bool(mask.any()):
        return inliers
    others = on_grid(values.masked_fill(~mask, 0))
    codes = torch.where(mask, others.codes, inliers.codes)
    whole = QuantizedWeight(codes, inliers.scale, inliers.zero, inliers.group)
    return TwoScaleWeight(whole, others.scale, others.zero, mask.reshape(-1).nonzero().flatten())
