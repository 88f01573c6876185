"""GPTQ: each column is rounded to the target that compensates best for the errors of earlier columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Factor
from sensitivity.quantize.layer.error_cost import ErrorCost
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.clip import clipped
from sensitivity.quantize.solvers.column_pass import round_columns
from sensitivity.quantize.solvers.gptqmodel_solver import gptqmodel
from sensitivity.quantize.solvers.shifting import shifted
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, group_size, ranges, scale_and_zero
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.quantize.transforms.hadamard import quantize_rotated
from sensitivity.spec.plan import Scheme

# All groups within this many columns get their grids at once, from the compensated weights when rounding reaches the
# first of these columns. Released code does the same, and it is more accurate: at 2 bits in groups of 64, a new grid
# for each group costs 4 % more error, since compensation widens the ranges of the weights (reports/parity-gptq.md).
SPAN = 128
# Finds scale and zero point of each group in a span of columns, from the weights of these columns, the scheme, their
# importance (the diagonal of D), and the first column
Find = Callable[[Tensor, Scheme, Tensor, int], tuple[Tensor, Tensor]]


def quantize_gptq(linears: Linears, schemes: Sequence[Scheme]) -> Sequence[Sequence[StoredWeight | None]]:
    """Quantize at all bit widths at once: they share the factor and each step over the columns."""
    if schemes[0].get("backend") == "gptqmodel":
        return gptqmodel(linears, schemes)
    if schemes[0].get("transform") == "hadamard":
        return quantize_rotated(linears, schemes, by_columns)
    return by_columns(linears, schemes)


def by_columns(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """GPTQ on the weights that it is given, without a transform."""
    factor = factor_of(linears, schemes[0])

    def find(weights: Tensor, scheme: Scheme, importance: Tensor, _: int) -> tuple[Tensor, Tensor]:
        return searched_grid(weights, scheme, linears.dtype, importance if scheme.get("clip") else None)

    rows = towards_float(linears, schemes[0], factor)
    return [linears.split(whole) for whole in on_integer_grids(factor, rows, schemes, find)]


def towards_float(linears: Linears, scheme: Scheme, factor: Factor) -> Tensor:
    """The weights, shifted so that the layer's output fits the float model's for inputs from quantized layers."""
    if (shift := scheme.get("shift", "none")) == "none":
        return linears.rows
    return shifted(
        linears.rows, factor, linears.both_paths.cross, float(scheme.get("strength", 1.0) or 0), shift == "later"
    )


def factor_of(linears: Linears, scheme: Scheme) -> Factor:
    """The factor of the Gram matrix under a scheme's damping and order of columns."""
    return linears.input_statistics.factor(float(scheme["damp"] or 0), scheme.get("order") == "activation")


def searched_grid(weights: Tensor, scheme: Scheme, dtype: torch.dtype, cost: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group: after a clip search if columns have a cost, else of the full range.

    The search weighs each column by the diagonal of D, not by H: later columns compensate for the rest.
    """
    if cost is None:
        low, high = ranges(weights, scheme)
    else:
        low, high = clipped(weights, scheme, dtype, ErrorCost.of(cost, group_size(scheme, weights)))
    return scale_and_zero(weights, scheme, low, high, dtype)


def on_integer_grids(factor: Factor, rows: Tensor, schemes: Sequence[Scheme], find: Find) -> list[QuantizedWeight]:
    """Round a weight on integer grids, at several schemes that differ in bits alone."""
    grid = IntegerGrid(factor, rows, schemes, find)
    return grid.results(round_columns(factor, rows, grid, len(schemes)))


class IntegerGrid:
    """Integer grids of several bit widths, side by side: scale and zero point of each group and row."""

    def __init__(self, factor: Factor, rows: Tensor, schemes: Sequence[Scheme], find: Find) -> None:
        self.schemes, self.find, self.importance = schemes, find, factor.importance
        self.group, width = group_size(schemes[0], rows), rows.shape[1]
        # groups are of columns in stored order, so if columns are rounded in another order, `where` has their places
        where, stored = torch.arange(width), factor.importance
        if factor.order is not None:
            where = factor.order.cpu()
            # the factor lists importance in order of rounding; grids are computed in stored order
            stored = stored[torch.argsort(factor.order)]
        self.group_of = (where // self.group).tolist()
        # in another order the columns of a group are not rounded one after the other, so that compensated weights of
        # the whole group never exist at once: the grid stays that of the original weights
        adaptive = isinstance(schemes[0].group, int) and factor.order is None
        self.span = max(SPAN // self.group, 1) * self.group if adaptive else 0
        grids = [find(rows, scheme, stored, 0) for scheme in schemes]
        self.scale, self.zero = ([grid[i].T.contiguous() for grid in grids] for i in (0, 1))  # groups x rows
        self.levels = torch.cat(
            [torch.full_like(scale[0], 2**s.bits - 1) for scale, s in zip(self.scale, schemes, strict=True)]
        )
        self._held: tuple[int, Tensor, Tensor] | None = None

    def fit(self, a: int, b: int, compensated: Sequence[Tensor]) -> None:
        """Recompute the grids of the groups in columns a to b, from their compensated weights."""
        first, self._held = a // self.group, None
        for i, (weights, scheme) in enumerate(zip(compensated, self.schemes, strict=True)):
            scale, zero = self.find(weights, scheme, self.importance[a:b], a)
            count = scale.shape[1]
            self.scale[i][first : first + count], self.zero[i][first : first + count] = scale.T, zero.T

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """The nearest codes of one column, and their values."""
        group = self.group_of[column]
        # scales are gathered only when a column is in another group than the one before it
        if self._held is None or self._held[0] != group:
            self._held = group, torch.cat([s[group] for s in self.scale]), torch.cat([z[group] for z in self.zero])
        _, scale, zero = self._held
        torch.div(target, scale, out=codes).add_(zero).round_().clamp_(min=0)
        torch.minimum(codes, self.levels, out=codes)
        return (codes - zero) * scale

    def results(self, codes: Sequence[Tensor]) -> list[QuantizedWeight]:
        """What is stored at each bit width."""
        grids = zip(codes, self.scale, self.zero, strict=True)
        return [QuantizedWeight(c, s.T.contiguous(), z.T.contiguous(), self.group) for c, s, z in grids]
