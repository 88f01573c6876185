"""BPDQ: bit planes with free coefficients, fitted alternately with the bits, under error feedback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.grids.level_grid import LevelGrid
from sensitivity.quantize.layer.curvature import Factor
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.column_pass import round_columns
from sensitivity.quantize.solvers.gptq import factor_of
from sensitivity.quantize.stored.integer_grid import as_16_bit, group_size
from sensitivity.quantize.stored.levels import PlanesWeight, bit
from sensitivity.spec.plan import Scheme

RIDGE = 1e-4  # share of the mean diagonal of a row's normal equations
START_BITS = 8  # the width of the integer codes whose highest bits are the planes that iterations start from


def quantize_bpdq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[PlanesWeight | None]]:
    """Round to q = c_0 + sum_k c_k b_k per row and group, with bits b and coefficients c improved alternately.

    Read in its code: the first planes are the highest bits of 8-bit codes; coefficients are least squares with a ridge
    of 1e-4 in the metric of the group's own factor; bits come from error feedback on the 2^k values of a row; the best
    of a few iterations (`turns`) is kept, and later columns compensate for its error. Ours: an iteration is judged by
    what its coefficients give after rounding, for each row alone.
    """
    factor = factor_of(linears, schemes[0])
    by_scheme: list[list[PlanesWeight | None]] = []
    for scheme in schemes:
        grid = PlaneGrid(linears, scheme, factor)
        (codes,) = round_columns(factor, linears.rows, grid)
        sizes = [len(weight) for weight in linears.weights]
        pieces = zip(torch.split(codes, sizes), torch.split(torch.stack(grid.found, 1), sizes), strict=True)
        by_scheme.append([PlanesWeight(bits, coefficients, grid.span) for bits, coefficients in pieces])
    return by_scheme


class PlaneGrid:
    """The solver's grid of bit planes: coefficients are fitted when it reaches a group."""

    def __init__(self, linears: Linears, scheme: Scheme, factor: Factor) -> None:
        self.span, self.factor, self.dtype = group_size(scheme, linears.rows), factor, linears.dtype
        self.planes, self.turns = scheme.bits, int(scheme["turns"] or 1)
        self.found: list[Tensor] = []  # coefficients of each group that was reached
        self.levels = LevelGrid(torch.zeros(1, 1))

    def fit(self, a: int, b: int, compensated: Sequence[Tensor]) -> None:
        """Fit the coefficients and the bits of one group alternately, and keep each row's best coefficients."""
        (weights,) = compensated
        factor = Factor(self.factor.unit[a:b, a:b], self.factor.importance[a:b], None, self.factor.damp)
        tried = refit(weights, first_codes(weights, self.planes), self.planes, factor, self.dtype)
        best, least = tried, torch.full((len(weights),), torch.inf, device=weights.device)
        for _ in range(self.turns):
            (codes,) = round_columns(factor, weights, LevelGrid(levels_of(tried)))
            error = cost(weights - levels_of(tried).gather(1, codes.long()), factor)
            best = torch.where((error < least)[:, None], tried, best)
            least = torch.minimum(error, least)
            tried = refit(weights, codes, self.planes, factor, self.dtype)
        self.found.append(best)
        self.levels = LevelGrid(levels_of(best))

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """The nearest sum of planes."""
        return self.levels.round(column, target, codes)


def first_codes(weights: Tensor, planes: int) -> Tensor:
    """The highest bits of asymmetric 8-bit codes; the highest of all is the last plane."""
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    steps = (1 << START_BITS) - 1
    codes = ((weights - low) * (steps / (high - low).clamp(min=torch.finfo(torch.float32).tiny))).round()
    return codes.clamp_(0, steps).to(torch.uint8) >> (START_BITS - planes)


def levels_of(coefficients: Tensor) -> Tensor:
    """The 2^planes values of each row, in order of their codes."""
    planes = coefficients.shape[1] - 1
    patterns = torch.arange(2**planes, device=coefficients.device)
    ones = torch.stack([torch.ones(2**planes, device=coefficients.device), *(bit(patterns, k) for k in range(planes))])
    levels: Tensor = coefficients @ ones
    return levels


def refit(weights: Tensor, codes: Tensor, planes: int, factor: Factor, dtype: torch.dtype) -> Tensor:
    """The coefficients (rows x planes + 1) of least error for given bits, in the metric M D M' of a group."""
    root = factor.importance.sqrt()
    features = torch.stack([torch.ones_like(weights), *(bit(codes, k) for k in range(planes))], 1)
    features, target = (features @ factor.unit) * root, (weights @ factor.unit) * root
    normal = features @ features.transpose(1, 2)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return as_16_bit(torch.linalg.solve(normal, features @ target[:, :, None])[:, :, 0], dtype)


def cost(error: Tensor, factor: Factor) -> Tensor:
    """The cost of each row's errors once all later columns have compensated for them."""
    return ((error @ factor.unit).square() * factor.importance).sum(1)
