"""Rounds attention's probabilities to an even grid or to powers, each by itself."""

from __future__ import annotations

import torch
from torch import Tensor

NONE, EVEN, ADAPTIVE = "none", "uniform", "adaptive"
# grids of powers, by how many levels halve a probability: log2 as in FQ-ViT (Lin et al. 2022), log-sqrt2 as in RepQ-ViT
# (Li et al. 2023, code read), which keeps apart the large ones that decide an output
HALVINGS = {"log2": 1, "log-sqrt2": 2}
GRIDS = (NONE, EVEN, *HALVINGS, ADAPTIVE)


def round_probabilities(probabilities: Tensor, bits: int, halving: int, largest: float = 1.0) -> Tensor:
    """Probabilities rounded to `bits`, in their own type: to even steps where `halving` is 0, else to powers.

    The levels are largest * 2^(-k / halving), nearest in the logarithm. The last code is zero, so that what is masked
    stays so; RepQ-ViT's code has zero beside its 2^b levels. Rows are not made to sum to 1 again, as there.
    """
    values, codes = probabilities.float() / largest, 2**bits - 1
    rounded: Tensor
    if halving == 0:
        rounded = (values.clamp(max=1) * codes).round_() / codes
    else:
        found = (-halving * values.log2()).round_().clamp_(min=0)
        rounded = torch.where(found < codes, (-found / halving).exp2(), torch.zeros_like(found))
    return (rounded * largest).to(probabilities.dtype)
