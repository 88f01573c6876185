"""LeanQuant: grids with more levels where an error raises the loss most, then error feedback by columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.grids.kmeans import kmeans_levels
from sensitivity.quantize.grids.level_grid import LevelGrid
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.column_pass import round_columns
from sensitivity.quantize.solvers.gptq import factor_of, on_integer_grids, searched_grid
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, as_16_bit
from sensitivity.quantize.stored.levels import LevelsWeight
from sensitivity.spec.plan import Scheme


def quantize_leanquant(linears: Linears, schemes: Sequence[Scheme]) -> list[list[LevelsWeight | None]]:
    """GPTQ on a codebook per row by k-means with the weights d^-p (Zhang and Shrivastava 2024).

    Read in its code: d is the diagonal of the Cholesky factor of the inverse of H, so that 1/d^2 is our D; p is a
    setting. Its default of 4 is from memory and was not read. Ours: the clustering starts from dynamic programming,
    theirs from equal steps for 8 levels or fewer.
    """
    factor = factor_of(linears, schemes[0])
    stored = factor.importance if factor.order is None else factor.importance[torch.argsort(factor.order)]
    weights = _weights(stored, schemes[0])[None]
    by_scheme: list[list[LevelsWeight | None]] = []
    for scheme in schemes:
        levels = as_16_bit(kmeans_levels(linears.rows, weights, 2**scheme.bits), linears.dtype)
        (codes,) = round_columns(factor, linears.rows, LevelGrid(levels))
        sizes = [len(weight) for weight in linears.weights]
        pieces = zip(torch.split(codes, sizes), torch.split(levels, sizes), strict=True)
        by_scheme.append([LevelsWeight(*piece) for piece in pieces])
    return by_scheme


def quantize_leanquant_affine(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """LeanQuant on integer grids: ranges are searched under the weights d^-p, then GPTQ rounds on these grids.

    Only that there is such a version was read, not how it searches. Ours is the clip search of `gptq`, which is the
    case p = 2.
    """

    def find(weights: Tensor, scheme: Scheme, importance: Tensor, _: int) -> tuple[Tensor, Tensor]:
        return searched_grid(weights, scheme, linears.dtype, _weights(importance, scheme))

    factor = factor_of(linears, schemes[0])
    return [linears.split(whole) for whole in on_integer_grids(factor, linears.rows, schemes, find)]


def _weights(importance: Tensor, scheme: Scheme) -> Tensor:
    """d^-p of each column, relative to the largest so that no power overflows."""
    return (importance / importance.max()).pow(float(scheme["exponent"] or 0) / 2)
