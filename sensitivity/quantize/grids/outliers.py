"""Outliers: finds the elements of a weight with the highest scores, and stores them apart in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import as_16_bit
from sensitivity.quantize.stored.sparse import SparseWeight
from sensitivity.quantize.stored.weight import StoredWeight


def largest(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest scores; of equal scores, those that come first in the weight."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if count:
        flat = score.reshape(-1)
        least = flat.kthvalue(len(flat) - count + 1).values
        above = flat > least
        # topk breaks ties in no fixed order, and the exactness rule needs one
        tied = (flat == least).nonzero().flatten()[: count - int(above.sum())]
        mask |= above
        mask[tied] = True
    return mask.reshape(score.shape)


def beside_outliers(base: StoredWeight, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> StoredWeight:
    """A stored weight with the elements under a mask kept in 16 bits; the stored weight itself if there are none."""
    index = mask.reshape(-1).nonzero().flatten()
    return SparseWeight(base, index, as_16_bit(weight.reshape(-1)[index], dtype)) if len(index) else base
