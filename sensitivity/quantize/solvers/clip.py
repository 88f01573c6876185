"""Clip search: for each group of weights, the clipping range with the least output error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.layer.error_cost import ErrorCost
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, group_size, ranges, scale_and_zero
from sensitivity.spec.plan import Scheme

# Lin et al. 2023 (AWQ): from 1 down to 0.55 of the largest magnitude in steps of 0.05; 0.5 itself is not tried
RATIOS = tuple(1 - i / 20 for i in range(10))
NUMBERS_AT_ONCE = 1 << 20  # numbers that are rounded at once, so few that they fit a CPU cache
MIN_ROWS = 64  # but at least this many rows at once


def quantize_clip(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """Search the best clipping range of each group, then round to nearest within it."""
    rows = linears.rows
    cost = ErrorCost.of(linears.input_statistics.gram, group_size(schemes[0], rows))
    results = []
    for scheme in schemes:
        low, high = clipped(rows, scheme, linears.dtype, cost)
        results.append(linears.split(encode(rows, scheme, *scale_and_zero(rows, scheme, low, high, linears.dtype))))
    return results


def clipped(rows: Tensor, scheme: Scheme, dtype: torch.dtype, cost: ErrorCost) -> tuple[Tensor, Tensor]:
    """The lowest and highest weight of each group after the clipping that costs least.

    All ratios are tried for a block of rows at once, as one batch.
    """
    low, high = ranges(rows, scheme)
    if scheme.symmetric and scheme.bits == 1:
        return low, high  # plus or minus the mean magnitude, whatever the range
    # the ratio 1 comes first, and a tie goes to the first: a range is clipped only where that costs less
    ratios = torch.tensor(RATIOS, device=rows.device)[:, None]
    for g, weights in enumerate(torch.split(rows, group_size(scheme, rows), 1)):
        # `block`, `block_low` and `block_high` are the weights and ranges of `block_rows` rows
        block_rows = max(NUMBERS_AT_ONCE // (len(RATIOS) * weights.shape[1]), MIN_ROWS)
        # one buffer for all blocks of the group, since the system takes time to provide new memory
        buffer = torch.empty(len(RATIOS) * block_rows * weights.shape[1], device=rows.device)
        for block, block_low, block_high in zip(
            *(torch.split(t, block_rows) for t in (weights, low[:, g], high[:, g])), strict=True
        ):
            # ratios shrink the larger side first: a side that is already inside the new edge keeps its range
            edge = ratios * torch.maximum(-block_low, block_high)
            lows, highs = torch.maximum(block_low, -edge), torch.minimum(block_high, edge)
            error = buffer[: len(RATIOS) * block.numel()].view(len(RATIOS), *block.shape)
            best = cost.cheapest(g, rounding_error(block, scheme, lows, highs, dtype, out=error))
            # `block_low` and `block_high` are views of `low` and `high`, so this fills the result in place
            block_low.copy_(lows.gather(0, best[None])[0])
            block_high.copy_(highs.gather(0, best[None])[0])
    return low, high


def rounding_error(
    weights: Tensor, scheme: Scheme, low: Tensor, high: Tensor, dtype: torch.dtype, out: Tensor
) -> Tensor:
    """The rounding error (quantized minus original) of weights (... x size) within given ranges (shape ...).

    Every step is in place in `out`, since the search passes all candidates at once.
    """
    scale, zero = (t[..., None] for t in scale_and_zero(weights, scheme, low, high, dtype))
    torch.div(weights, scale, out=out).add_(zero).round_().clamp_(0, 2**scheme.bits - 1)
    return out.sub_(zero).mul_(scale).sub_(weights)
