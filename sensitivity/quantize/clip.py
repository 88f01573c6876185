"""Clip search: the range of each group of weights that costs least, judged by the inputs those weights meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.error_cost import ErrorCost
from sensitivity.quantize.grid import QuantizedWeight, affine, columns, encode, ranges
from sensitivity.quantize.linears import Linears
from sensitivity.spec.plan import Scheme

# Lin et al. 2023 (AWQ): down to half of the largest magnitude, in steps of a twentieth, half itself left out
RATIOS = tuple(1 - i / 20 for i in range(10))
PIECE, ROWS = 1 << 20, 64  # numbers that are rounded at once, which a cache should hold, or this many rows


def clip(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """Round to nearest within the best ranges."""
    rows = linears.rows
    cost = ErrorCost.of(linears.seen.gram, columns(schemes[0], rows))
    results = []
    for scheme in schemes:
        low, high = clipped(rows, scheme, linears.dtype, cost)
        results.append(linears.split(encode(rows, scheme, *affine(rows, scheme, low, high, linears.dtype))))
    return results


def clipped(rows: Tensor, scheme: Scheme, dtype: torch.dtype, cost: ErrorCost) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight of each group after the best clipping: all ratios of some rows are one batch."""
    low, high = ranges(rows, scheme)
    if scheme.symmetric and scheme.bits == 1:
        return low, high  # plus or minus the mean magnitude, whatever the range
    ratios = torch.tensor(RATIOS, device=rows.device)[:, None]
    for g, weights in enumerate(torch.split(rows, columns(scheme, rows), 1)):
        at = max(PIECE // (len(RATIOS) * weights.shape[1]), ROWS)
        room = torch.empty(len(RATIOS) * at * weights.shape[1], device=rows.device)
        for some, least, most in zip(*(torch.split(t, at) for t in (weights, low[:, g], high[:, g])), strict=True):
            edge = ratios * torch.maximum(-least, most)
            lows, highs = torch.maximum(least, -edge), torch.minimum(most, edge)
            error = room[: len(RATIOS) * some.numel()].view(len(RATIOS), *some.shape)
            best = cost.cheapest(g, rounding(some, scheme, lows, highs, dtype, out=error))
            least.copy_(lows.gather(0, best[None])[0])
            most.copy_(highs.gather(0, best[None])[0])
    return low, high


def rounding(weights: Tensor, scheme: Scheme, low: Tensor, high: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    """What rounding to nearest within some ranges adds to weights (... x size, a range for each ...)."""
    scale, zero = (t[..., None] for t in affine(weights, scheme, low, high, dtype))
    torch.div(weights, scale, out=out).add_(zero).round_().clamp_(0, 2**scheme.bits - 1)
    return out.sub_(zero).mul_(scale).sub_(weights)
