"""Clip search: the range of each group of weights that costs least, judged by the inputs those weights meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.plan import Scheme
from sensitivity.quantize.grid import Quantised, affine, columns, encode, ranges
from sensitivity.quantize.linears import Linears

# Lin et al. 2023 (AWQ): down to half of the largest magnitude, in steps of a twentieth, half itself left out
RATIOS = tuple(1 - i / 20 for i in range(10))
PIECE = 1 << 18  # numbers that are rounded at once: a processor's cache holds them over all the steps of rounding
STRIP = 64  # columns of a Gram matrix in one product


def clip(linears: Linears, schemes: Sequence[Scheme]) -> list[list[Quantised | None]]:
    """Round to nearest within the best ranges."""
    rows, gram = linears.rows, linears.seen.gram
    results = []
    for scheme in schemes:
        low, high = clipped(rows, scheme, linears.dtype, gram)
        results.append(linears.split(encode(rows, scheme, *affine(rows, scheme, low, high, linears.dtype))))
    return results


def clipped(rows: Tensor, scheme: Scheme, dtype: torch.dtype, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight of each group after the best clipping.

    `curvature` is a Gram matrix, of which each group uses its own block, or a weight for each column.
    """
    size, piece = columns(scheme, rows), max(PIECE // rows.shape[1], 1)
    lows, highs = ranges(rows, scheme)
    if scheme.symmetric and scheme.bits == 1:
        return lows, highs  # plus or minus the mean magnitude, whatever the range
    weights, blocks = grouped(rows, size), own_blocks(curvature, size)
    found = []
    for some, low, high in zip(*(torch.split(t, piece) for t in (weights, lows, highs)), strict=True):
        largest = torch.maximum(-low, high)
        error, best = torch.empty_like(some), (low, high)
        cost = torch.full_like(low, math.inf)
        for ratio in RATIOS:
            shrunk = torch.maximum(low, -ratio * largest), torch.minimum(high, ratio * largest)
            found_cost = group_errors(rounding(some, scheme, *shrunk, dtype, out=error), blocks)
            better = found_cost < cost
            cost = torch.where(better, found_cost, cost)
            best = torch.where(better, shrunk[0], best[0]), torch.where(better, shrunk[1], best[1])
        found.append(best)
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def grouped(rows: Tensor, size: int) -> Tensor:
    """... x columns as ... x groups x size, the last group filled up with zeros, which are rounded to themselves."""
    count = math.ceil(rows.shape[-1] / size)
    padded = torch.nn.functional.pad(rows, (0, count * size - rows.shape[-1]))
    return padded.reshape(*rows.shape[:-1], count, size)


def rounding(weights: Tensor, scheme: Scheme, low: Tensor, high: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    """What rounding to nearest within some ranges adds to weights (... x groups x size)."""
    scale, zero = (t[..., None] for t in affine(weights, scheme, low, high, dtype))
    torch.div(weights, scale, out=out).add_(zero).round_().clamp_(0, 2**scheme.bits - 1)
    return out.sub_(zero).mul_(scale).sub_(weights)


def group_errors(error: Tensor, curvature: Tensor) -> Tensor:
    """e H e' of each row and group on its own, rows x groups; what groups do to each other is left out.

    `curvature` holds a matrix for each group, as `halved` gives it, or a weight for each column (groups x size).
    """
    if curvature.dim() == 2:
        return error.square().mul_(curvature).sum(-1)
    if len(curvature) == 1:
        return quadratic(error[:, 0], curvature[0])[:, None]
    e = error.transpose(0, 1)
    return (e @ curvature).mul_(e).sum(-1).T


def quadratic(error: Tensor, half: Tensor) -> Tensor:
    """e H e' of each row, from H folded onto its upper half: the lower half of the products is never taken."""
    total = torch.zeros(len(error), device=error.device)
    for a in range(0, len(half), STRIP):
        b = min(a + STRIP, len(half))
        total += (error[:, :b] @ half[:b, a:b]).mul_(error[:, a:b]).sum(1)
    return total


def halved(gram: Tensor) -> Tensor:
    """A symmetric matrix folded onto its upper half, which gives the same e H e'."""
    return gram.triu(1).mul_(2) + gram.diagonal().diag_embed()


def own_blocks(curvature: Tensor, size: int) -> Tensor:
    """What each group needs of a curvature."""
    if curvature.dim() == 1:
        return grouped(curvature, size)
    count = math.ceil(len(curvature) / size)
    padding = count * size - len(curvature)
    padded = torch.nn.functional.pad(curvature, (0, padding, 0, padding))
    return torch.stack([halved(padded[i : i + size, i : i + size]) for i in range(0, count * size, size)])
