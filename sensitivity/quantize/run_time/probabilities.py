"""Rounds attention's probabilities to equal steps, or to powers of 2 or of its root."""

from __future__ import annotations

import torch
from torch import Tensor

NONE, EVEN, ADAPTIVE = "none", "uniform", "adaptive"
# Grids of powers, and how many steps halve a probability: log2 as in FQ-ViT (Lin et al. 2022), log-sqrt2 as in RepQ-ViT
# (Li et al. 2023, code read). Large probabilities decide the output, and log-sqrt2 with its smaller steps rounds them
# less.
HALVINGS = {"log2": 1, "log-sqrt2": 2}
GRIDS = (NONE, EVEN, *HALVINGS, ADAPTIVE)


def round_probabilities(probabilities: Tensor, bits: int, halving: int, largest: float = 1.0) -> Tensor:
    """Probabilities rounded to `bits`, in their own dtype: to equal steps where `halving` is 0, else to powers.

    The powers are largest * 2^(-k / halving); the one with the nearest logarithm is taken. The last code means zero, so
    that masked positions stay zero; RepQ-ViT's code has zero in addition to its 2^b levels. As there, rows are not
    normalized again.
    """
    values, codes = probabilities.float() / largest, 2**bits - 1
    rounded: Tensor
    if halving == 0:
        rounded = (values.clamp(max=1) * codes).round_() / codes
    else:
        found = (-halving * values.log2()).round_().clamp_(min=0)
        rounded = torch.where(found < codes, (-found / halving).exp2(), torch.zeros_like(found))
    return (rounded * largest).to(probabilities.dtype)
