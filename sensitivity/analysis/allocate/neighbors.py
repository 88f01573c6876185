"""Plans near the best ones of a budget, with what measuring each is expected to gain: where a search goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.spec.plan import Plan

Floats = np.ndarray
NEAR, COMPARED = 3, 200  # measured plans whose neighbors are looked at, and neighbors whose gains are computed
MOST = 5000  # neighbors of one plan that are looked at; of a hundred components there are a hundred thousand


def plans_near(
    knapsack: Knapsack,
    budget: int,
    weights: Mapping[str, float],
    known: Mapping[Plan, float],
    predicted: Plan | None,
    fits: Callable[[Plan], bool],
    draw: np.random.Generator,
) -> list[tuple[float, Plan]]:
    """Plans of at most so many bits near the best ones, and what each is expected to gain over all measured ones.

    known: the share of full precision that each measured plan within the budget keeps, of which there is at least one.
    predicted: the plan that is predicted to be best, measured or not, whose neighbors are looked at, too; None where
    predictions have failed, and a gain is one over what the best plan is believed to keep. weights: how much each task
    counts. A gain is a mean over scores drawn from the surrogate's uncertainty, so that it is never negative: plans
    gain that are expected to be good, or may be.
    """
    measured = sorted(known, key=lambda plan: -known[plan])
    total = sum(weights.values())
    shares = {task: weight / total / (knapsack.full(task) or 1.0) for task, weight in weights.items()}

    def expected(rows: Floats) -> Floats:
        kept = [share * knapsack.models[task].predict(rows) for task, share in shares.items()]
        return np.asarray(np.sum(kept, axis=0))

    first = [] if predicted is None else [predicted]
    around = knapsack.space.encode(list(dict.fromkeys([*first, *measured[:NEAR]])))
    near = [changed_at_most_twice(knapsack, row, budget, expected) for row in around]
    rows = np.unique(np.concatenate(near), axis=0)
    best = rows[np.argsort(-expected(rows), kind="stable")][:COMPARED]
    plans = [plan for plan in map(knapsack.space.decode, best) if plan not in known and fits(plan)]
    if not plans:
        return []
    index = knapsack.space.encode(plans if predicted is None else [*plans, *measured])
    each = [share * knapsack.models[task].draws(index, draw, explore=True) for task, share in shares.items()]
    drawn = np.sum(each, axis=0)
    kept = max(known.values())
    if predicted is not None:
        # in each draw by itself, since what all plans of a draw have in common is no gain
        kept = drawn[:, len(plans) :].max(axis=1, keepdims=True)
    gains = np.maximum(drawn[:, : len(plans)] - kept, 0.0).mean(axis=0)
    return list(zip(gains.tolist(), plans, strict=True))


def changed_at_most_twice(
    knapsack: Knapsack, plan: Floats, budget: int, expected: Callable[[Floats], Floats]
) -> Floats:
    """The plans of at most so many bits that differ from a given one in at most two components, as rows of positions.

    expected: what plans are expected to keep. Of very many plans, those whose two changes promise most, each by itself.
    """
    changes = [(c, choice) for c, options in enumerate(knapsack.space.choices) for choice in range(len(options))]
    where, to = np.array(changes).T
    alone = np.tile(plan, (len(changes), 1))
    alone[np.arange(len(changes)), where] = to
    more = np.array([knapsack.bits[c][choice] - knapsack.bits[c][plan[c]] for c, choice in changes])
    own = sum(sizes[choice] for sizes, choice in zip(knapsack.bits, plan, strict=True)) + knapsack.kept
    first, second = np.triu_indices(len(changes))
    # two changes of one component are none
    usable = ((where[first] != where[second]) | (first == second)) & (
        own + more[first] + np.where(first == second, 0, more[second]) <= budget
    )
    first, second = first[usable], second[usable]
    if len(first) > MOST:
        gain = expected(alone)
        best = np.argsort(-(gain[first] + gain[second]), kind="stable")[:MOST]
        first, second = first[best], second[best]
    rows: Floats = alone[first]
    rows[np.arange(len(rows)), where[second]] = to[second]
    return rows
