"""BiLLM: one bit per weight, in two halves by magnitude; two bits in salient columns; error feedback between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.grids.binary import residual
from sensitivity.quantize.layer.curvature import Factor
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.column_pass import round_columns
from sensitivity.quantize.solvers.gptq import factor_of
from sensitivity.quantize.stored.integer_grid import group_size
from sensitivity.quantize.stored.levels import BinaryWeight
from sensitivity.spec.plan import Scheme

SHARES = tuple(i / 20 for i in range(2, 19))  # of a block's elements that lie below the split; the release tries 81
SAMPLE = 2**20  # the quantiles of a block are those of about this many of its magnitudes


def quantize_billm(linears: Linears, schemes: Sequence[Scheme]) -> list[list[BinaryWeight | None]]:
    """Round weight by weight, in blocks of columns, to one or two signs (Huang et al. 2024).

    Read in its code: the salient columns are those with the largest sum of w^2/d^2 (1/d^2 is our D, see Factor), as
    many (fewer than 50 of 128) as give the least error, and have two signs. The other elements are split into two
    halves at the best of some quantiles of their magnitude. Mean and magnitude are per row. Only later blocks
    compensate for the errors of a block. Ours: the split is searched on w, in the release on w^2/d^2; numbers of
    columns are tried in powers of two; later blocks compensate exactly for the errors that were made.
    """
    factor = factor_of(linears, schemes[0])
    by_scheme: list[list[BinaryWeight | None]] = []
    for scheme in schemes:
        results: list[BinaryWeight | None] = []
        for weight in linears.weights:
            grid = BlockGrid(scheme, factor, group_size(scheme, weight), linears.dtype)
            (codes,) = round_columns(factor, weight.detach().float(), grid)
            results.append(grid.result(codes))
        by_scheme.append(results)
    return by_scheme


@dataclass(frozen=True)
class Block:
    """One block of columns: the fields of a BinaryWeight with a single group."""

    codes: Tensor
    halves: Tensor
    salient: Tensor | None
    columns: Tensor | None


class BlockGrid:
    """A grid for the solver that rounds a whole block at once, without error feedback inside the block."""

    def __init__(self, scheme: Scheme, factor: Factor, span: int, dtype: torch.dtype) -> None:
        self.span, self.importance, self.dtype = span, factor.importance, dtype
        self.salient, self.split = int(scheme["salient"] or 0), bool(scheme["split"])
        self.blocks: list[Block] = []

    def fit(self, a: int, b: int, compensated: Sequence[Tensor]) -> None:
        """Choose columns and halves of the block, and round it."""
        (weights,) = compensated
        block = binarized(weights, self.importance[a:b], self.salient, self.split, self.dtype)
        self.blocks.append(block)
        self.first = a
        self.codes, self.values = block.codes.T.contiguous(), dequantized(block).T.contiguous()

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """The codes and values that `fit` chose for a column."""
        codes.copy_(self.codes[column - self.first])
        return self.values[column - self.first]

    def result(self, codes: Tensor) -> BinaryWeight:
        """All blocks as one weight."""
        salient = [block.salient for block in self.blocks if block.salient is not None]
        columns = [block.columns for block in self.blocks if block.columns is not None]
        return BinaryWeight(
            codes=codes,
            halves=torch.cat([block.halves for block in self.blocks], 1),
            salient=torch.cat(salient, 1) if salient else None,
            columns=torch.cat(columns) if columns else None,
            group=self.span,
        )


def dequantized(block: Block) -> Tensor:
    """A block, dequantized."""
    return BinaryWeight(block.codes, block.halves, block.salient, block.columns, block.codes.shape[1]).dequantize()


def binarized(weights: Tensor, importance: Tensor, most: int, split: bool, dtype: torch.dtype) -> Block:
    """Round a block (rows x columns): at most `most` salient columns, and its other weights in one or two halves."""
    two_signs = _salient_columns(weights, importance, most) if most else None
    salient = torch.zeros(weights.shape[1], device=weights.device) if two_signs is None else two_signs.float()
    mask = (1 - salient)[None].expand_as(weights)
    above = _split(weights, mask) if split else torch.zeros_like(weights)
    means, magnitudes, codes = [], [], torch.zeros_like(weights, dtype=torch.uint8)
    for half in (1 - above, above) if split else (1 - above,):
        mean, magnitude, sign = residual(weights, mask * half, 1, dtype)
        means.append(mean)
        magnitudes.append(magnitude[:, 0])
        codes = torch.where(half > 0, sign, codes)
    codes = codes | (above.to(torch.uint8) << 1)
    halves = torch.stack([torch.stack(means, 1), torch.stack(magnitudes, 1)], 2)[:, None]
    if two_signs is None:
        return Block(codes, halves, None, None)
    mean, magnitude, sign = residual(weights, salient[None].expand_as(weights), 2, dtype)
    return Block(
        torch.where(two_signs, sign, codes), halves, torch.cat([mean[:, None], magnitude], 1)[:, None], two_signs
    )


def _salient_columns(weights: Tensor, importance: Tensor, most: int) -> Tensor:
    """Which columns get two signs: those with the largest sum of w^2/d^2, as many as give the least error.

    As in the release, the other columns are judged with two signs as well, so that the search finds the columns that
    differ most from the rest; otherwise more columns would always be better.
    """
    rank = (weights.square().sum(0) * importance).argsort(descending=True, stable=True)
    best, least = torch.zeros(len(rank), dtype=torch.bool, device=weights.device), float("inf")
    limit = min(most, len(rank) - 1)
    for count in sorted({min(2**i, limit) for i in range(max(limit, 1).bit_length() + 1)} - {0}):
        tried = torch.zeros_like(best)
        tried[rank[:count]] = True
        error = sum(_error(weights, part.float()[None].expand_as(weights), 2) for part in (tried, ~tried))
        if error < least:
            best, least = tried, float(error)
    return best


def _split(weights: Tensor, mask: Tensor) -> Tensor:
    """1 where an element lies in the upper half by magnitude, at the split of least error."""
    size = weights.abs()
    some = size[mask > 0]
    if not len(some):
        return torch.zeros_like(weights)
    ordered = some[:: max(len(some) // SAMPLE, 1)].sort()[0]
    best, least = torch.zeros_like(weights), float("inf")
    for share in SHARES:
        above = (size > ordered[int(share * (len(ordered) - 1))]).float()
        error = _error(weights, mask * (1 - above), 1) + _error(weights, mask * above, 1)
        if error < least:
            best, least = above, float(error)
    return best


def _error(x: Tensor, mask: Tensor, order: int) -> float:
    """The squared error of a residual binary approximation of the elements under a mask (1 or 0)."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    left = x * mask
    for _ in range(order):
        left = (left - left.sum(-1, keepdim=True) / count) * mask
        magnitude = left.abs().sum(-1, keepdim=True) / count
        left = (left.abs() - magnitude) * left.sign() * mask
    return float(left.square().sum())
