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
    low, high = ranges(rows, scheme)
    largest = torch.maximum(-low, high)
    cost = error = None
    best = low, high
    for ratio in RATIOS:
        shrunk = torch.maximum(low, -ratio * largest), torch.minimum(high, ratio * largest)
        rounded = encode(rows, scheme, *affine(rows, scheme, *shrunk, dtype)).dequantise()
        error = group_errors(rows - rounded, columns(scheme, rows), curvature)
        if cost is None:
            cost = error
            continue
        better = error < cost
        cost = torch.where(better, error, cost)
        best = torch.where(better, shrunk[0], best[0]), torch.where(better, shrunk[1], best[1])
    return best


def group_errors(difference: Tensor, size: int, curvature: Tensor) -> Tensor:
    """e H e' of each row and group on its own, rows x groups; what groups do to each other is left out."""
    rows, cols = difference.shape
    count = math.ceil(cols / size)
    padding = count * size - cols
    e = torch.nn.functional.pad(difference, (0, padding)).reshape(rows, count, size)
    if curvature.dim() == 1:
        return (e.square() * torch.nn.functional.pad(curvature, (0, padding)).reshape(count, size)).sum(-1)
    padded = torch.nn.functional.pad(curvature, (0, padding, 0, padding))
    blocks = torch.stack([padded[i : i + size, i : i + size] for i in range(0, count * size, size)])
    e = e.transpose(0, 1)
    return ((e @ blocks) * e).sum(-1).T
