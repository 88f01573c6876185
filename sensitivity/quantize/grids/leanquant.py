"""LeanQuant: grids that spend their levels where an error costs the loss most, then error feedback by columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.grids.kmeans import kmeans
from sensitivity.quantize.grids.level_grid import LevelGrid
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.gptq import factor_of, on_integers, searched
from sensitivity.quantize.solvers.sweep import sweep
from sensitivity.quantize.stored.grid import QuantizedWeight, as_16_bit
from sensitivity.quantize.stored.levels import LevelsWeight
from sensitivity.spec.plan import Scheme


def leanquant(linears: Linears, schemes: Sequence[Scheme]) -> list[list[LevelsWeight | None]]:
    """GPTQ on a codebook per row by k-means with the weights d^-p (Zhang and Shrivastava 2024).

    Read in its code: d is the diagonal of the Cholesky factor of the inverse of H, so that 1/d^2 is our D; p is a
    setting. Its default of 4 is from memory and was not read. Ours: the clustering starts from a dynamic program, where
    theirs starts from equal steps for 8 levels or fewer.
    """
    factor = factor_of(linears, schemes[0])
    stored = factor.importance if factor.order is None else factor.importance[torch.argsort(factor.order)]
    weights, by_scheme = _weights(stored, schemes[0])[None], []
    for scheme in schemes:
        levels = as_16_bit(kmeans(linears.rows, weights, 2**scheme.bits), linears.dtype)
        (codes,) = sweep(factor, linears.rows, LevelGrid(levels))
        sizes = [len(weight) for weight in linears.weights]
        pieces = zip(torch.split(codes, sizes), torch.split(levels, sizes), strict=True)
        by_scheme.append([LevelsWeight(*piece) for piece in pieces])
    return [list(results) for results in by_scheme]


def affine(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """The version on integer grids: ranges are searched under the weights d^-p, then GPTQ rounds on them.

    That there is such a version was read; how it searches was not. We use the clip search of `gptq`, whose weights are
    the case p = 2.
    """

    def find(weights: Tensor, scheme: Scheme, importance: Tensor, _: int) -> tuple[Tensor, Tensor]:
        return searched(weights, scheme, linears.dtype, _weights(importance, scheme))

    factor = factor_of(linears, schemes[0])
    return [linears.split(whole) for whole in on_integers(factor, linears.rows, schemes, find)]


def _weights(importance: Tensor, scheme: Scheme) -> Tensor:
    """d^-p of each column, relative to the largest so that no power overflows."""
    return (importance / importance.max()).pow(float(scheme["exponent"] or 0) / 2)
