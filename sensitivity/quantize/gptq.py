"""GPTQ: each column is rounded to the target that compensates best for the errors of earlier columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.clip import clipped
from sensitivity.quantize.curvature import Factor
from sensitivity.quantize.error_cost import ErrorCost
from sensitivity.quantize.gptqmodel_solver import gptqmodel
from sensitivity.quantize.grid import QuantizedWeight, columns, ranges, scale_and_zero
from sensitivity.quantize.linears import Linears
from sensitivity.spec.plan import Scheme

LEAF = 32  # columns that are rounded one by one before one matrix product carries their errors to the rest
# All groups within this many columns get their grids at once, from the compensated weights at the first of these
# columns. Released code does the same, and it is more accurate: at 2 bits in groups of 64, a fresh grid for every group
# costs 4 % more error, since compensation widens the ranges of the weights (reports/parity-gptq.md).
SPAN = 128


def gptq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """Quantize at all bit widths at once: they share the factor and each step over the columns."""
    first = schemes[0]
    if first.get("backend") == "gptqmodel":
        return gptqmodel(linears, schemes)
    factor = linears.input_statistics.factor(float(first["damp"] or 0), first["order"] == "activation")
    runs = [_WidthState.start(linears, scheme, factor) for scheme in schemes]
    _ColumnPass(factor, runs, linears.rows).round_all(columns(first, linears.rows), isinstance(first.group, int))
    return [linears.split(run.result(factor)) for run in runs]


@dataclass
class _WidthState:
    """The state of one bit width during the pass over the columns.

    Everything is transposed (columns x rows), so that a column of the weight is contiguous in memory.
    """

    scheme: Scheme
    rest: Tensor  # columns x rows; the compensated target of a column to come, the residual W - Q of one that is done
    codes: Tensor
    scale: Tensor  # groups x rows
    zero: Tensor
    group: int
    of_column: list[int]  # for each column in order of rounding: the index of its group
    dtype: torch.dtype
    adaptive: bool  # whether a group's grid is computed when the pass reaches it, from compensated weights

    @classmethod
    def start(cls, linears: Linears, scheme: Scheme, factor: Factor) -> _WidthState:
        """The state before the first column, with grids of the original weights."""
        rows, group = linears.rows, columns(scheme, linears.rows)
        # groups are of columns as they are stored, so with an order each rounded column looks its group up in `where`
        ordered, where, importance = rows, torch.arange(rows.shape[1]), factor.importance
        if factor.order is not None:
            ordered, where = rows[:, factor.order], factor.order.cpu()
            # the factor lists importance in order of rounding; grids are computed in stored order
            importance = importance[torch.argsort(factor.order)]
        scale, zero = _grid(rows, scheme, linears.dtype, importance)
        return cls(
            scheme=scheme,
            rest=ordered.T.contiguous().clone(),
            codes=torch.empty(rows.shape[::-1], dtype=torch.uint8, device=rows.device),
            scale=scale.T.contiguous(),
            zero=zero.T.contiguous(),
            group=group,
            of_column=(where // group).tolist(),
            dtype=linears.dtype,
            # in another order a group is not rounded in one go, so its grid stays that of the original weights
            adaptive=isinstance(scheme.group, int) and factor.order is None,
        )

    def regrid(self, a: int, compensated: Tensor, importance: Tensor) -> None:
        """Recompute the grids of the groups that begin at column a, from their compensated weights."""
        scale, zero = _grid(compensated, self.scheme, self.dtype, importance)
        first, count = a // self.group, scale.shape[1]
        self.scale[first : first + count], self.zero[first : first + count] = scale.T, zero.T

    def result(self, factor: Factor) -> QuantizedWeight:
        """The codes in stored order of columns, with rows first again."""
        codes = self.codes if factor.order is None else self.codes[torch.argsort(factor.order)]
        return QuantizedWeight(codes.T.contiguous(), self.scale.T.contiguous(), self.zero.T.contiguous(), self.group)


def _grid(rows: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, after a clip search if the scheme asks for one.

    The search weighs each column by `importance` (the diagonal of D), not by H: later columns compensate for the
    rest.
    """
    if scheme.get("clip"):
        low, high = clipped(rows, scheme, dtype, ErrorCost.of(importance, columns(scheme, rows)))
    else:
        low, high = ranges(rows, scheme)
    return scale_and_zero(rows, scheme, low, high, dtype)


class _ColumnPass:
    """The pass over the columns, which recursive halving turns into mostly large matrix products.

    The exactness rule needs a bit width to give the same codes whether it runs alone or beside others. Matrix products
    are therefore taken per width, always of the same shapes. Only elementwise operations run on all widths at once, and
    none of them is fused, as a fused one may round differently.
    """

    def __init__(self, factor: Factor, runs: list[_WidthState], rows: Tensor) -> None:
        self.unit, self.importance, self.runs = factor.unit, factor.importance, runs
        self.target = (rows if factor.order is None else rows[:, factor.order]).T.contiguous()
        levels = [torch.full_like(run.scale[0], 2**run.scheme.bits - 1) for run in runs]
        self.levels = torch.cat(levels)

    def round_all(self, group: int, grouped: bool) -> None:
        """Round all columns: in spans of whole groups where grids adapt, otherwise in leaves."""
        total = len(self.target)
        if grouped and self.runs[0].adaptive:
            _halve(0, total, max(SPAN // group, 1) * group, self._groups, self._carry)
        else:
            _halve(0, total, LEAF, self._leaf, self._carry)

    def _groups(self, a: int, b: int) -> None:
        """Compute the grids of the groups in columns a to b, then round these columns.

        `rest` holds w + c, where c is the compensation for all columns before a. If the span could stay
        unrounded, its weights would become w + c M^-1 with the span's own block of M: inside the span each
        column's shift is a residual that the later ones compensate for in turn. Grids are made for those
        weights.
        """
        own = self.unit[a:b, a:b]
        for run in self.runs:
            compensation = run.rest[a:b] - self.target[a:b]
            shifts = torch.linalg.solve_triangular(own.T, compensation, upper=False, unitriangular=True)
            run.regrid(a, (self.target[a:b] + shifts).T, self.importance[a:b])
        _halve(a, b, LEAF, self._leaf, self._carry)

    def _leaf(self, a: int, b: int) -> None:
        """Round columns a to b one by one, all bit widths side by side.

        Each column's residual is added to the targets of the later columns of this leaf; `_carry` tells the
        columns after it.
        """
        block = torch.cat([run.rest[a:b] for run in self.runs], dim=1)
        original = self.target[a:b].repeat(1, len(self.runs))
        codes = torch.empty_like(block)
        held: list[int] | None = None
        for i in range(b - a):
            groups = [run.of_column[a + i] for run in self.runs]
            # scales are gathered only when a width enters another group: for most columns they stay the same
            if groups != held:
                held = groups
                scale = torch.cat([run.scale[g] for run, g in zip(self.runs, groups, strict=True)])
                zero = torch.cat([run.zero[g] for run, g in zip(self.runs, groups, strict=True)])
            code = torch.div(block[i], scale, out=codes[i]).add_(zero).round_().clamp_(min=0)
            torch.minimum(code, self.levels, out=code)
            # the residual is that of the original weight, not of the compensated target: see Factor
            error = original[i] - (code - zero) * scale
            block[i] = error
            if i + 1 < b - a:
                block[i + 1 :] += self.unit[a + i, a + i + 1 : b, None] * error
        width = self.target.shape[1]
        for run, done, chosen in zip(
            self.runs, torch.split(block, width, 1), torch.split(codes, width, 1), strict=True
        ):
            run.rest[a:b] = done
            run.codes[a:b] = chosen.to(torch.uint8)

    def _carry(self, a: int, middle: int, b: int) -> None:
        """Add the residuals of columns a to middle, times M, to the targets of columns middle to b."""
        for run in self.runs:
            run.rest[middle:b].addmm_(self.unit[a:middle, middle:b].T, run.rest[a:middle])


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
