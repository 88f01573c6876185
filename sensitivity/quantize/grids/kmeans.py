"""Weighted k-means of each row's numbers, by dynamic programming and Lloyd's iterations."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 64  # up to this many numbers of a row are partitioned exactly; more are first joined into this many bins
FEW_LEVELS = 16  # up to this many levels are found by dynamic programming, which takes longer the more there are
STEPS = 50  # at most this many of Lloyd's iterations, as in SqueezeLLM
NUMBERS_AT_ONCE = 1 << 20  # a block of rows has at most this many numbers, and as many costs of intervals


def kmeans_levels(rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """Levels (rows x count, rising) with a small sum of weights x (number - nearest level)^2.

    `weights` has the shape of the rows, or one row for all. Sorted numbers that share a level are neighbors, so dynamic
    programming finds the best partition (Wang and Song 2011). Up to 64 numbers and 16 levels the result is the
    optimum. Longer rows are first cut into 64 bins. More levels get one bin each, without dynamic programming. Lloyd's
    iterations then move the partition to a local optimum.
    """
    size = max(NUMBERS_AT_ONCE // max(rows.shape[1], (BINS + 1) ** 2), 1)
    weights = weights.expand_as(rows)
    pairs = zip(torch.split(rows, size), torch.split(weights, size), strict=True)
    return torch.cat([_levels(block.float(), its_weights, count) for block, its_weights in pairs])


def nearest_levels(rows: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest level of each number, as uint8."""
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    return torch.searchsorted(middles, rows.contiguous()).to(torch.uint8)


def _levels(rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """The levels of a block of rows."""
    values, order = rows.sort(1)
    weights = weights.double().gather(1, order)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)  # where all are 0, all numbers count alike
    # running sums, whose differences are the sums of any interval; subtracting the mean first loses fewer digits
    middle = values.double().mean(1, keepdim=True)
    x = values.double() - middle
    sums = torch.nn.functional.pad(torch.stack([weights, weights * x, weights * x * x]).cumsum(2), (1, 0))
    bounds = _cut(values, weights, BINS if count <= FEW_LEVELS else count)
    if count <= FEW_LEVELS:
        bounds = bounds.gather(1, _partition(sums.gather(2, bounds.expand(3, -1, -1)), count))
    levels = _lloyd(x.contiguous(), sums, bounds) + middle
    return torch.where(_distinct_count(values) <= count, _distinct_values(values, count), levels).float()


def _cut(values: Tensor, weights: Tensor, bins: int) -> Tensor:
    """Bounds (rows x bins + 1) that cut sorted numbers into bins; a row of at most `bins` numbers has a bin for each.

    For many levels the best density of levels is the cube root of the weighted density of numbers (Panter and Dite
    1951). Between neighbors at distance d and of weight w that density is w / d, so the share of levels between them is
    proportional to (w d^2)^(1/3).
    """
    width = values.shape[1]
    if width <= bins:
        return torch.arange(bins + 1, device=values.device).clamp(max=width).expand(len(values), -1).contiguous()
    gaps = values.double().diff(dim=1)
    share = torch.nn.functional.pad(((weights[:, 1:] + weights[:, :-1]) / 2 * gaps * gaps).pow(1 / 3), (1, 0)).cumsum(1)
    wanted = share[:, -1:] * torch.arange(1, bins, device=values.device) / bins
    inner = torch.searchsorted(share, wanted)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=width)


def _partition(sums: Tensor, count: int) -> Tensor:
    """The indices (rows x count + 1) of the bounds that cut the bins into `count` intervals of least squared error.

    `sums` (3 x rows x bins + 1) are the running sums up to each bound.
    """
    (weight, first, second), bins = sums, sums.shape[2] - 1
    # the squared error of bins i to j as one interval; infinite where i > j
    w, s, q = (t[:, None, :] - t[:, :, None] for t in (weight, first, second))
    error = (q - s * s / w.clamp(min=torch.finfo(w.dtype).tiny)).clamp_(min=0).float()
    error.masked_fill_(torch.ones(bins + 1, bins + 1, dtype=torch.bool, device=error.device).tril(-1), torch.inf)
    total, origins = error[:, 0], []
    for _ in range(count - 1):
        total, origin = (total[:, :, None] + error).min(1)
        origins.append(origin)
    place = torch.full((len(error), 1), bins, device=error.device)
    places = [place]
    for origin in reversed(origins):
        place = origin.gather(1, place)
        places.append(place)
    return torch.cat([torch.zeros_like(place), *reversed(places)], 1)


def _lloyd(x: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """The means of the intervals, after moving each bound halfway between the means beside it until none moves."""
    means = x.gather(1, bounds[:, :-1].clamp(max=x.shape[1] - 1))
    for _ in range(STEPS):
        weight, first, _ = sums.gather(2, bounds.expand(3, -1, -1)).diff(dim=2)
        # an interval without weight keeps its level
        means = torch.where(weight > 0, first / weight.clamp(min=torch.finfo(weight.dtype).tiny), means).sort(1)[0]
        moved = bounds.clone()
        moved[:, 1:-1] = torch.searchsorted(x, ((means[:, 1:] + means[:, :-1]) / 2).contiguous())
        if torch.equal(moved, bounds):
            break
        bounds = moved
    return means


def _distinct_count(values: Tensor) -> Tensor:
    """How many different numbers each sorted row has."""
    return (values.diff(dim=1) > 0).sum(1, keepdim=True) + 1


def _distinct_values(values: Tensor, count: int) -> Tensor:
    """The first `count` different numbers of each sorted row; where there are fewer, the largest is repeated."""
    rank = torch.nn.functional.pad((values.diff(dim=1) > 0).cumsum(1), (1, 0)).clamp(max=count - 1)
    levels = values[:, -1:].expand(-1, count).contiguous()
    return levels.scatter(1, rank, values)
