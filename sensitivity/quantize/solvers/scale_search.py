"""AWQ's scale search: before rounding, enlarge the columns that read large inputs, and shrink these inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.error_cost import ErrorCost, quadratic, upper_half
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.clip import clipped, rounding_error
from sensitivity.quantize.stored.integer_grid import (
    QuantizedWeight,
    encode,
    group_size,
    ranges,
    scale_and_zero,
    scale_as_16_bit,
)
from sensitivity.spec.plan import Scheme

FLOOR = 1e-4  # least candidate scale before it is normalized, as in llm-awq
NUMBERS_AT_ONCE = 1 << 18  # numbers that the search holds at once, but at least one row under every candidate
# Lin et al. do not clip queries and keys: their product enters a softmax, which the layer's output error ignores
QUERY_KEY = re.compile(r"(^|[._])(q|k|query|key|w?qkv|q_proj|k_proj|query_key_value)[._]weight$", re.IGNORECASE)


def quantize_awq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """Find one scale per input channel for all weights that read the input, then clip, then round to nearest."""
    seen, first = linears.input_statistics, schemes[0]
    scaled_at_all = linears.foldable or first["scales"] == "stored"
    # where nothing can absorb a scale, the only candidate is a = 0, which scales nothing
    candidates = scales(seen, int(first["exponents"] or 1) if scaled_at_all else 1, linears.dtype)
    costs = output_errors(linears.rows, candidates, seen.gram, schemes, linears.dtype) if len(candidates) > 1 else None
    best = [0] * len(schemes) if costs is None else costs.argmin(1).tolist()
    cost = ErrorCost.of(seen.gram, group_size(first, linears.rows)) if first["clip"] else None
    return [_rounded(linears, scheme, candidates[i], cost) for scheme, i in zip(schemes, best, strict=True)]


def _rounded(linears: Linears, scheme: Scheme, factor: Tensor, cost: ErrorCost | None) -> list[QuantizedWeight | None]:
    """Clip and round the weights under the chosen scale."""
    scaled = linears.rows * factor
    low, high = ranges(scaled, scheme)
    if cost is not None:
        best = clipped(scaled, scheme, linears.dtype, cost.under(factor))
        # all weights that read the input are stacked as rows; queries and keys among them keep their full ranges
        clippable = torch.cat(
            [
                torch.full((len(weight), 1), bool(scheme["clip_qk"]) or not QUERY_KEY.search(name))
                for name, weight in zip(linears.names, linears.weights, strict=True)
            ]
        ).to(scaled.device)
        low, high = torch.where(clippable, best[0], low), torch.where(clippable, best[1], high)
    whole = encode(scaled, scheme, *scale_and_zero(scaled, scheme, low, high, linears.dtype))
    # a scale of 1 everywhere is not stored
    return linears.split(whole if bool((factor == 1).all()) else replace(whole, inputs=factor))


def scales(seen: Curvature, steps: int, dtype: torch.dtype) -> Tensor:
    """Candidate scales mean|x|^a for a = 0, 1/steps, 2/steps, ... (steps x channels); the first is all ones.

    Each is divided by sqrt(max * min), which centers it around 1, as in llm-awq.
    """
    exponents = torch.arange(steps, device=seen.gram.device) / steps
    candidates = seen.mean_magnitude.pow(exponents[:, None]).clamp(min=FLOOR)
    return scale_as_16_bit(
        candidates / (candidates.amax(1, keepdim=True) * candidates.amin(1, keepdim=True)).sqrt(), dtype
    )


def output_errors(
    rows: Tensor, candidates: Tensor, gram: Tensor, schemes: Sequence[Scheme], dtype: torch.dtype
) -> Tensor:
    """The output error tr(E H E') of the rounding error E, for each bit width under each candidate scale.

    With the Gram matrix H, the layer need not run on its inputs. All candidates are one batch, whose ranges serve
    every bit width; rows are taken in blocks.
    """
    count, cols = candidates.shape
    size, half = group_size(schemes[0], rows), upper_half(gram)
    total = torch.zeros(len(schemes), count, dtype=torch.float64, device=rows.device)
    for block in torch.split(rows, max(-(-NUMBERS_AT_ONCE // (count * cols)), 1)):
        scaled = grouped(block * candidates[:, None], size)
        # ranges() for all candidates at once; clipping comes later, under the best scale alone, as in llm-awq
        low, high = scaled.amin(-1).clamp_(max=0), scaled.amax(-1).clamp_(min=0)
        buffer = torch.empty_like(scaled)
        for i, scheme in enumerate(schemes):
            error = (
                rounding_error(scaled, scheme, low, high, dtype, out=buffer)
                .flatten(-2)[..., :cols]
                .div_(candidates[:, None])
            )
            total[i] += quadratic(error.reshape(-1, cols), half).reshape(count, -1).sum(1, dtype=torch.float64)
    return total


def grouped(rows: Tensor, size: int) -> Tensor:
    """Rows (... x columns) as ... x groups x size.

    The last group is padded with zeros, which change neither its range nor its result.
    """
    if padding := -rows.shape[-1] % size:
        rows = torch.nn.functional.pad(rows, (0, padding))
    return rows.reshape(*rows.shape[:-1], -1, size)
