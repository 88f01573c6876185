"""Scale search (AWQ): multiply the columns that meet large inputs before rounding, and divide their inputs again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sensitivity.plan import Scheme
from sensitivity.quantize.clip import clipped
from sensitivity.quantize.curvature import Curvature
from sensitivity.quantize.grid import Quantised, affine, encode, ranges, sixteen
from sensitivity.quantize.linears import Linears

FLOOR = 1e-4  # of a channel's mean magnitude, as in llm-awq
ROOM = 1 << 22  # numbers that the search may hold at once where a layer itself is smaller
# Lin et al. leave the ranges of queries and keys alone: their product meets a softmax, which the layer's error misses
QUERY_KEY = re.compile(r"(^|[._])(q|k|query|key|w?qkv|q_proj|k_proj|query_key_value)[._]weight$", re.IGNORECASE)


def awq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[Quantised | None]]:
    """One scale per input channel, found for all weights that read it together; then clipping; then nearest."""
    return [_one(linears, scheme) for scheme in schemes]


def _one(linears: Linears, scheme: Scheme) -> list[Quantised | None]:
    seen, rows = linears.seen, linears.rows
    scaled_at_all = linears.foldable or scheme["scales"] == "stored"
    grid = scales(seen, int(scheme["exponents"] or 1) if scaled_at_all else 1, linears.dtype)
    chosen = grid[int(errors(rows, grid, seen.gram, scheme, linears.dtype).argmin())]
    scaled, gram = rows * chosen, seen.gram / chosen[:, None] / chosen
    low, high = ranges(scaled, scheme)
    if scheme["clip"]:
        best = clipped(scaled, scheme, linears.dtype, gram)
        free = torch.cat(
            [
                torch.full((len(weight), 1), bool(scheme["clip_qk"]) or not QUERY_KEY.search(name))
                for name, weight in zip(linears.names, linears.weights, strict=True)
            ]
        ).to(rows.device)
        low, high = torch.where(free, best[0], low), torch.where(free, best[1], high)
    whole = encode(scaled, scheme, *affine(scaled, scheme, low, high, linears.dtype))
    return linears.split(whole if bool((chosen == 1).all()) else replace(whole, inputs=chosen))


def scales(seen: Curvature, steps: int, dtype: torch.dtype) -> Tensor:
    """Candidates mean|x|^a for a = 0, 1/steps, ..., each divided by sqrt(max min): steps x channels. The first is 1."""
    exponents = torch.arange(steps, device=seen.gram.device) / steps
    grid = seen.mean_magnitude.pow(exponents[:, None]).clamp(min=FLOOR)
    return sixteen(grid / (grid.amax(1, keepdim=True) * grid.amin(1, keepdim=True)).sqrt(), dtype)


def errors(rows: Tensor, grid: Tensor, gram: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """tr(D H D') for the rounding error D under each candidate: the output error, without any output.

    All candidates are one batch; rows come in pieces, so that no more is held than a layer's own size or `ROOM`.
    """
    count, cols = grid.shape
    piece = max(-(-len(rows) // count), ROOM // (count * cols), 1)
    total = torch.zeros(count, dtype=torch.float64, device=rows.device)
    for some in torch.split(rows, piece):
        scaled = (some * grid[:, None]).reshape(-1, cols)
        rounded = encode(scaled, scheme, *affine(scaled, scheme, *ranges(scaled, scheme), dtype)).dequantise()
        error = ((scaled - rounded).reshape(count, -1, cols) / grid[:, None]).reshape(-1, cols)
        total += ((error @ gram) * error).sum(1).reshape(count, -1).sum(1, dtype=torch.float64)
    return total
