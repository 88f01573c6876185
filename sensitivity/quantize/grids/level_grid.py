"""LevelGrid: a grid for the column-wise solver, with arbitrary levels for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LevelGrid:
    """Levels (rows x count) in any order, the same for all columns; the code of a level is its index."""

    span = 0

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.codes = levels.sort(dim=1, stable=True)
        self.middles = ((self.levels[:, 1:] + self.levels[:, :-1]) / 2).contiguous()

    def fit(self, a: int, b: int, compensated: Sequence[Tensor]) -> None:
        """Do nothing: all levels are known beforehand."""

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """The nearest level of each row."""
        place = torch.searchsorted(self.middles, target[:, None])
        codes.copy_(self.codes.gather(1, place)[:, 0])
        return self.levels.gather(1, place)[:, 0]
