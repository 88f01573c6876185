"""Column-wise error feedback (GPTQ): each column is rounded to what best makes up for the columns before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.clip import clipped
from sensitivity.quantize.curvature import Factor
from sensitivity.quantize.error_cost import ErrorCost
from sensitivity.quantize.gptqmodel_solver import gptqmodel
from sensitivity.quantize.grid import QuantizedWeight, affine, columns, ranges
from sensitivity.quantize.linears import Linears
from sensitivity.spec.plan import Scheme

LEAF = 32  # columns that are rounded one by one before the rest hears of it, in one matrix product
# Columns whose groups get their grids together, from the weights as they have become by the first of them. Released
# code does so too, and it is better so: at 2 bits in groups of 64 fresher grids cost 4 % more error, since what the
# weights make up for widens their ranges (reports/parity-gptq.md).
SPAN = 128


def gptq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """All widths at once: they share the factor and each step over the columns."""
    first = schemes[0]
    if first.get("backend") == "gptqmodel":
        return gptqmodel(linears, schemes)
    factor = linears.seen.factor(float(first["damp"] or 0), first["order"] == "activation")
    runs = [_Run.start(linears, scheme, factor) for scheme in schemes]
    _Sweep(factor, runs, linears.rows).go(columns(first, linears.rows), isinstance(first.group, int))
    return [linears.split(run.result(factor)) for run in runs]


@dataclass
class _Run:
    """One width on its way: everything is transposed, so that a column is a row in memory."""

    scheme: Scheme
    rest: Tensor  # columns x rows; the target of a column still to come, W - Q of one that is done
    codes: Tensor
    scale: Tensor  # groups x rows
    zero: Tensor
    group: int
    of_column: list[int]  # the group whose scale a column has
    dtype: torch.dtype
    adaptive: bool  # a group's grid is found when the sweep reaches it

    @classmethod
    def start(cls, linears: Linears, scheme: Scheme, factor: Factor) -> _Run:
        rows, group = linears.rows, columns(scheme, linears.rows)
        ordered, where, importance = rows, torch.arange(rows.shape[1]), factor.importance
        if factor.order is not None:
            ordered, where = rows[:, factor.order], factor.order.cpu()
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
            # with columns out of order a group would be met in pieces: its grid is then that of the weights as given
            adaptive=isinstance(scheme.group, int) and factor.order is None,
        )

    def regrid(self, a: int, compensated: Tensor, importance: Tensor) -> None:
        """The grids of the groups that begin at column a, for what has become of their weights."""
        scale, zero = _grid(compensated, self.scheme, self.dtype, importance)
        first, count = a // self.group, scale.shape[1]
        self.scale[first : first + count], self.zero[first : first + count] = scale.T, zero.T

    def result(self, factor: Factor) -> QuantizedWeight:
        codes = self.codes if factor.order is None else self.codes[torch.argsort(factor.order)]
        return QuantizedWeight(codes.T.contiguous(), self.scale.T.contiguous(), self.zero.T.contiguous(), self.group)


def _grid(rows: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    if scheme.get("clip"):
        low, high = clipped(rows, scheme, dtype, ErrorCost.of(importance, columns(scheme, rows)))
    else:
        low, high = ranges(rows, scheme)
    return affine(rows, scheme, low, high, dtype)


class _Sweep:
    """The pass over the columns. Halving keeps nearly all of its work in large matrix products.

    A width gives the same bits whether it runs alone or with others: products are taken per width, always of the
    same shapes, and what is done for all widths at once is done element by element, without fused operations.
    """

    def __init__(self, factor: Factor, runs: list[_Run], rows: Tensor) -> None:
        self.unit, self.importance, self.runs = factor.unit, factor.importance, runs
        self.target = (rows if factor.order is None else rows[:, factor.order]).T.contiguous()
        levels = [torch.full_like(run.scale[0], 2**run.scheme.bits - 1) for run in runs]
        self.levels = torch.cat(levels)

    def go(self, group: int, grouped: bool) -> None:
        total = len(self.target)
        if grouped and self.runs[0].adaptive:
            _halve(0, total, max(SPAN // group, 1) * group, self._groups, self._carry)
        else:
            _halve(0, total, LEAF, self._leaf, self._carry)

    def _groups(self, a: int, b: int) -> None:
        """Find the grids of some groups, then round them.

        `rest` holds w + c, where c has yet to hear of columns a to b; what the weights would become if they were left
        free is w + c M^-1, with M their part of the factor.
        """
        own = self.unit[a:b, a:b]
        for run in self.runs:
            heard = run.rest[a:b] - self.target[a:b]
            free = torch.linalg.solve_triangular(own.T, heard, upper=False, unitriangular=True)
            run.regrid(a, (self.target[a:b] + free).T, self.importance[a:b])
        _halve(a, b, LEAF, self._leaf, self._carry)

    def _leaf(self, a: int, b: int) -> None:
        """Round columns a to b one by one, all widths together."""
        block = torch.cat([run.rest[a:b] for run in self.runs], dim=1)
        original = self.target[a:b].repeat(1, len(self.runs))
        codes = torch.empty_like(block)
        held: list[int] | None = None
        for i in range(b - a):
            groups = [run.of_column[a + i] for run in self.runs]
            if groups != held:
                held = groups
                scale = torch.cat([run.scale[g] for run, g in zip(self.runs, groups, strict=True)])
                zero = torch.cat([run.zero[g] for run, g in zip(self.runs, groups, strict=True)])
            code = torch.div(block[i], scale, out=codes[i]).add_(zero).round_().clamp_(min=0)
            torch.minimum(code, self.levels, out=code)
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
        """Tell columns middle to b what became of columns a to middle."""
        for run in self.runs:
            run.rest[middle:b].addmm_(self.unit[a:middle, middle:b].T, run.rest[a:middle])


def _halve(
    a: int, b: int, step: int, solve: Callable[[int, int], None], carry: Callable[[int, int, int], None]
) -> None:
    """Solve a to b in pieces of at most `step`, from the left, each after all before it were carried to it."""
    if b - a <= step:
        solve(a, b)
        return
    middle = a + step * -((a - b) // (2 * step))
    _halve(a, middle, step, solve, carry)
    carry(a, middle, b)
    _halve(middle, b, step, solve, carry)
