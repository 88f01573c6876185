"""Plans near the best ones of a budget, with what measuring each is expected to gain: where a search goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations_with_replacement

import numpy as np

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.spec.plan import Plan

Floats = np.ndarray
NEAR, COMPARED = 3, 200  # measured plans whose neighbors are looked at, and neighbors whose gains are computed


def plans_near(
    knapsack: Knapsack,
    budget: int,
    weights: Mapping[str, float],
    known: Mapping[Plan, float],
    predicted: Plan,
    fits: Callable[[Plan], bool],
    draw: np.random.Generator,
) -> list[tuple[float, Plan]]:
    """Plans of at most so many bits near the best ones, and what each is expected to gain over all measured ones.

    known: the share of full precision that each measured plan within the budget keeps. predicted: the plan that is
    predicted to be best, measured or not. weights: how much each task counts. A gain is a mean over scores drawn from
    the surrogate's uncertainty, so that it is never negative: plans gain that are expected to be good, or may be.
    """
    measured = sorted(known, key=lambda plan: -known[plan])
    rows = changed_at_most_twice(knapsack, list(dict.fromkeys([predicted, *measured[:NEAR]])))
    bits = sum(sizes[rows[:, c]] for c, sizes in enumerate(knapsack.bits)) + knapsack.kept
    rows = rows[bits <= budget]
    total = sum(weights.values())
    shares = {task: weight / total / (knapsack.full(task) or 1.0) for task, weight in weights.items()}
    expected = sum(share * knapsack.models[task].predict(rows) for task, share in shares.items())
    best = rows[np.argsort(-np.asarray(expected), kind="stable")][:COMPARED]
    plans = [plan for plan in map(knapsack.space.decode, best) if plan not in known and fits(plan)]
    if not plans:
        return []
    index = knapsack.space.encode([*plans, *measured])
    each = [share * knapsack.models[task].draws(index, draw, explore=True) for task, share in shares.items()]
    drawn = np.sum(each, axis=0)
    # in each draw by itself, since what all plans of a draw have in common is no gain
    kept = drawn[:, len(plans) :].max(axis=1, keepdims=True, initial=0.0)
    gains = np.maximum(drawn[:, : len(plans)] - kept, 0.0).mean(axis=0)
    return list(zip(gains.tolist(), plans, strict=True))


def changed_at_most_twice(knapsack: Knapsack, plans: list[Plan]) -> Floats:
    """All plans that differ from a given one in at most two components, as rows of positions."""
    counts = [len(options) for options in knapsack.space.choices]
    single = [(c, choice) for c, count in enumerate(counts) for choice in range(count)]
    changes = np.full((len(single) * (len(single) + 1) // 2, len(counts)), -1)
    for row, ((a, one), (b, other)) in zip(changes, combinations_with_replacement(single, 2), strict=True):
        row[a], row[b] = one, other
    rows = knapsack.space.encode(plans)
    return np.unique(np.concatenate([np.where(changes < 0, plan, changes) for plan in rows]), axis=0)
