"""SpQR: small groups whose scales are quantized too, and outliers by error, under error feedback by columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.grids.outliers import largest
from sensitivity.quantize.layer.curvature import Factor
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.column_pass import round_columns
from sensitivity.quantize.solvers.gptq import IntegerGrid, factor_of
from sensitivity.quantize.stored.integer_grid import as_16_bit, encode, group_size, ranges, scale_and_zero
from sensitivity.quantize.stored.sparse import SparseWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import outlier_count

ROWS_PER_GRID = 16  # rows whose scales share one grid, as do their zero points


def quantize_spqr(linears: Linears, schemes: Sequence[Scheme]) -> list[list[StoredWeight | None]]:
    """GPTQ weight by weight, in groups of 16 columns, with outliers in 16 bits (Dettmers et al. 2023).

    Read in its code: groups of 16, scales and zero points in 3 bits for every 16 rows, columns in order of activation,
    a damping of 1, ranges without outliers, and outliers chosen by the error w - q divided by d (1/d^2 is our D, see
    Factor) and kept without error. Ours: outliers are a fixed share of the weight, so that a plan has a size before it
    is computed, where the release has a threshold (.2 of the mean variance); they are chosen once, from the original
    weights.
    """
    factor = factor_of(linears, schemes[0])
    weights = [weight.detach().float() for weight in linears.weights]
    return [[_one_weight(weight, scheme, factor, linears.dtype) for weight in weights] for scheme in schemes]


def _one_weight(weight: Tensor, scheme: Scheme, factor: Factor, dtype: torch.dtype) -> StoredWeight:
    """Quantize one weight at one bit width."""
    importance = factor.importance if factor.order is None else factor.importance[torch.argsort(factor.order)]
    mask = largest(gain(weight, scheme, importance, dtype), outlier_count(scheme["outliers"], *weight.shape))

    def find(weights: Tensor, scheme: Scheme, _: Tensor, a: int) -> tuple[Tensor, Tensor]:
        inside = weights.masked_fill(mask[:, a : a + weights.shape[1]], 0)
        scale, zero = scale_and_zero(inside, scheme, *ranges(inside, scheme), dtype)
        bits = int(scheme["scale_bits"] or 16)
        return (scale, zero) if bits >= 16 else (second_level(scale, bits, dtype), second_level(zero, bits, dtype))

    rounded = mask if factor.order is None else mask[:, factor.order]
    grid = OutlierGrid(IntegerGrid(factor, weight, [scheme], find), rounded, dtype)
    codes = round_columns(factor, weight, grid)
    (whole,) = grid.inner.results(codes)
    if not bool(mask.any()):
        return whole
    # the values were collected column by column in order of rounding; they are stored row by row in stored order
    rows, cols = grid.mask.T.nonzero().unbind(1)[::-1]
    index = rows * weight.shape[1] + (cols if factor.order is None else factor.order[cols])
    index, order = index.sort()
    return SparseWeight(whole, index, torch.cat(grid.kept)[order])


class OutlierGrid:
    """A grid for the solver with outliers: an outlier becomes its target in 16 bits, which leaves almost no error."""

    def __init__(self, inner: IntegerGrid, mask: Tensor, dtype: torch.dtype) -> None:
        self.inner, self.mask, self.dtype, self.span = inner, mask, dtype, inner.span
        self.columns = mask.T.contiguous()
        self.kept: list[Tensor] = []

    def fit(self, a: int, b: int, compensated: Sequence[Tensor]) -> None:
        """Fit the grid of all other elements."""
        self.inner.fit(a, b, compensated)

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """The nearest code of each row, but the target itself where it is an outlier."""
        values, mask = self.inner.round(column, target, codes), self.columns[column]
        exact = as_16_bit(target, self.dtype)
        self.kept.append(exact[mask])
        return torch.where(mask, exact, values)


def gain(weight: Tensor, scheme: Scheme, importance: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much the error of a group falls if an element is an outlier, and the group's range is that of the others.

    Only the smallest and the largest element of a group set its range; any other saves no more than its own error.
    """
    group = group_size(scheme, weight)

    def errors(inside: Tensor) -> Tensor:
        grid = scale_and_zero(inside, scheme, *ranges(inside, scheme), dtype)
        return (encode(weight, scheme, *grid).dequantize() - weight).square() * importance

    def in_groups(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, -weight.shape[1] % group)).reshape(len(weight), -1, group)

    in_range = in_groups(errors(weight))
    saved = in_range.clone()
    for extreme in (in_groups(weight).argmax(2, keepdim=True), in_groups(weight).argmin(2, keepdim=True)):
        inside = in_groups(weight).scatter(2, extreme, 0.0).reshape(len(weight), -1)[:, : weight.shape[1]]
        others = in_groups(errors(inside)).scatter(2, extreme, 0.0)
        saved.scatter_(2, extreme, in_range.sum(2, keepdim=True) - others.sum(2, keepdim=True))
    return saved.reshape(len(weight), -1)[:, : weight.shape[1]]


def second_level(values: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Scales or zero points (rows x groups) on an asymmetric grid from the smallest to the largest of every 16 rows."""
    rows = len(values)
    fill = values[-1:].expand(-rows % ROWS_PER_GRID, -1)  # copies of the last row widen no range
    blocks = torch.cat([values, fill]).reshape(-1, ROWS_PER_GRID, values.shape[1])
    low, high = as_16_bit(blocks.amin(1, keepdim=True), dtype), blocks.amax(1, keepdim=True)
    step = as_16_bit((high - low) / (2**bits - 1), dtype)
    codes = ((blocks - low) / step.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, 2**bits - 1)
    return (codes * step + low).reshape(-1, values.shape[1])[:rows]
