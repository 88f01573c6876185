"""The pass over columns with error feedback: rounds each column on a grid that the caller provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Factor

LEAF = 32  # columns that are rounded one by one before one matrix product carries their errors to the rest


class Grid(Protocol):
    """The levels that columns are rounded to; columns are numbered in the order in which they are rounded."""

    @property
    def span(self) -> int:
        """How many columns `fit` takes together; 0: all levels are known beforehand, and `fit` is not called."""

    def fit(self, a: int, b: int, compensated: Sequence[Tensor]) -> None:
        """Find the levels of columns a to b from their compensated weights (rows x columns, one for each problem)."""

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """Fill `codes` with the codes of one column, and return its values; all problems are concatenated."""


def round_columns(factor: Factor, rows: Tensor, grid: Grid, count: int = 1) -> list[Tensor]:
    """Round the columns of a weight for `count` problems, such as bit widths, that the grid treats side by side.

    Returns the codes (rows x columns, in stored order) of each.
    """
    work = _Pass(factor, rows, grid, count)
    _halve(0, len(work.target), grid.span or LEAF, work.fitted if grid.span else work.leaf, work.carry)
    back = slice(None) if factor.order is None else torch.argsort(factor.order)
    return [codes[back].T.contiguous() for codes in work.codes]


class _Pass:
    """The pass over the columns, which recursive halving turns into mostly large matrix products.

    The exactness rule needs a bit width to give the same codes whether it runs alone or beside others. Matrix products
    are therefore taken per width, always of the same shapes. Only elementwise operations run on all widths at once, and
    none of them is fused, as a fused one may round differently.

    Everything is transposed (columns x rows), so that a column of the weight is contiguous in memory.
    """

    def __init__(self, factor: Factor, rows: Tensor, grid: Grid, count: int) -> None:
        self.unit, self.grid = factor.unit, grid
        self.target = (rows if factor.order is None else rows[:, factor.order]).T.contiguous()
        # per problem: the compensated target of each column that is not rounded yet, the residual W - Q of the others
        self.rest = [self.target.clone() for _ in range(count)]
        self.codes = [torch.empty_like(self.target, dtype=torch.uint8) for _ in range(count)]

    def fitted(self, a: int, b: int) -> None:
        """Let the grid find the levels of columns a to b, then round these columns.

        `rest` holds w + c, where c compensates for all columns before a. If columns a to b could stay unrounded, their
        weights would become w + c M^-1 with their own block of M, since the shift of each of these columns is a
        residual for which the later ones compensate. Grids are fitted to those weights.
        """
        unit, compensated = self.unit[a:b, a:b], []
        for rest in self.rest:
            compensation = rest[a:b] - self.target[a:b]
            free = torch.linalg.solve_triangular(unit.T, compensation, upper=False, unitriangular=True)
            compensated.append((self.target[a:b] + free).T)
        self.grid.fit(a, b, compensated)
        _halve(a, b, LEAF, self.leaf, self.carry)

    def leaf(self, a: int, b: int) -> None:
        """Round columns a to b one by one, all problems side by side.

        Each column's residual, times M, is added to the targets of the later columns of this leaf; `carry` adds it to
        the columns after the leaf.
        """
        block = torch.cat([rest[a:b] for rest in self.rest], dim=1)
        original = self.target[a:b].repeat(1, len(self.rest))
        codes = torch.empty_like(block)
        for i in range(b - a):
            # the residual is that of the original weight, not of the compensated target: see Factor
            error = original[i] - self.grid.round(a + i, block[i], codes[i])
            block[i] = error
            if i + 1 < b - a:
                block[i + 1 :] += self.unit[a + i, a + i + 1 : b, None] * error
        width = self.target.shape[1]
        for rest, into, done, rounded in zip(
            self.rest, self.codes, torch.split(block, width, 1), torch.split(codes, width, 1), strict=True
        ):
            rest[a:b] = done
            into[a:b] = rounded.to(torch.uint8)

    def carry(self, a: int, middle: int, b: int) -> None:
        """Add the residuals of columns a to middle, times M, to the targets of columns middle to b."""
        for rest in self.rest:
            rest[middle:b].addmm_(self.unit[a:middle, middle:b].T, rest[a:middle])


def _halve(
    a: int, b: int, step: int, solve: Callable[[int, int], None], carry: Callable[[int, int, int], None]
) -> None:
    """Solve columns a to b from left to right in pieces of at most `step` columns.

    Halving makes the products of `carry` as large as possible. Every piece is solved after the residuals of all
    columns before it were carried to it.
    """
    if b - a <= step:
        solve(a, b)
        return
    # the middle is a multiple of `step` from a, rounded up, so that only the last piece can be shorter
    middle = a + step * -((a - b) // (2 * step))
    _halve(a, middle, step, solve, carry)
    carry(a, middle, b)
    _halve(middle, b, step, solve, carry)
