"""Spends a budget: finds the plans of at most a given size that are predicted to score best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

import numpy as np

from sensitivity.analysis.allocate.infeasibility import infeasible
from sensitivity.analysis.allocate.knapsack import Knapsack, Predicted, mean_of
from sensitivity.analysis.allocate.one_by_one import best_of_compared
from sensitivity.analysis.allocate.program import GAP, Program
from sensitivity.analysis.observations import check_task
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed, intersection
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import Size, bits_in_bytes, budget_bits
from sensitivity.study.study import Study

Floats = np.ndarray
Found = TypeVar("Found")
# weighted mean shares of full precision that differ by less count as equal: predictions are far less sure
TIE = 1e-5
MOST = 8  # plans that are looked at beyond those asked for: where so many are nearly equal, hundreds are


@dataclass(frozen=True)
class Candidate:
    """A plan that fits a budget and is predicted to score well."""

    plan: Plan
    size: Size
    budget: float  # in bpw
    rank: int  # among the candidates of its budget, 0 for the best
    predicted: dict[str, Predicted]

    def to_json(self) -> dict[str, object]:
        """The candidate as JSON values."""
        predicted = {task: p.to_json() for task, p in self.predicted.items()}
        return {
            "plan": self.plan.to_json(),
            "describe": self.plan.describe(),
            "size": self.size.to_json(),
            "budget_bpw": self.budget,
            "rank": self.rank,
            "predicted": predicted,
        }


def solve(
    study: Study,
    *,
    bpw: float | Iterable[float] | None = None,
    bytes: float | Iterable[float] | None = None,
    tasks: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    floors: Mapping[str, float] | None = None,
    allowed: Allowed | None = None,
    tied: Sequence[Sequence[str]] = (),
    top: int = 3,
    knapsack: Knapsack | None = None,
    loadable: Allowed | None = None,
) -> list[Candidate]:
    """The best few plans for each budget, best first; nothing is measured.

    bpw or bytes: one budget or several. tasks: those whose shares of full precision count, equally or by `weights`;
    the study's first by default. floors: task -> share of full precision that must be kept. allowed: which choices a
    component may have, and loadable: which a runtime can load. tied: components that must share their scheme. knapsack:
    one that was built before.
    """
    weights = dict(weights or dict.fromkeys(tasks or study.tasks[:1], 1.0))
    for name in (*weights, *(floors or {})):
        check_task(study, name)
    if not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise UserError(f"weights of tasks must be above 0, not {min(weights.values()):g}")
    if bad := [share for share in (floors or {}).values() if not 0 < share <= 1]:
        raise UserError(f"a floor is a share of full precision above 0 and at most 1, such as 0.95, not {bad[0]:g}")
    if top < 1:
        raise UserError(f"at least one plan must be tried (--top), not {top}")
    knapsack = knapsack or Knapsack.of(study, list(dict.fromkeys([*weights, *(floors or {})])))
    return [
        candidate
        for budget, asked in budgets_in_bits(study.parts, bpw, bytes)
        for candidate in spend(knapsack, budget, weights, floors, allowed, tied, top, asked, loadable)
    ]


def budgets_in_bits(
    parts: ComponentMap, bpw: float | Iterable[float] | None, size_in_bytes: float | Iterable[float] | None
) -> list[tuple[int, float]]:
    """Each limit in bits, and in bits per weight as the user gave it."""
    if (bpw is None) == (size_in_bytes is None):
        raise UserError("a recommendation needs one budget: bits per weight (--bpw 4.0) or bytes (--gb 2.5)")
    given = bpw if size_in_bytes is None else size_in_bytes
    limits = [float(limit) for limit in (given if isinstance(given, Iterable) else [given or 0.0])]
    if bad := [limit for limit in limits if not (math.isfinite(limit) and limit > 0)]:
        raise UserError(f"a budget must be above 0, not {bad[0]:g}")
    if size_in_bytes is not None:
        return [(bits, bits / parts.numel) for bits in map(bits_in_bytes, limits)]
    return [(budget_bits(parts, limit), limit) for limit in limits]


def of_met(budgets: Sequence[float], find: Callable[[float], Found]) -> tuple[dict[float, Found], list[str]]:
    """What is found for each budget in bits per weight, and a sentence for each that no plan meets.

    Where no budget can be met, that is an error.
    """
    met: dict[float, Found] = {}
    failures: dict[float, UserError] = {}
    for bpw in budgets:
        try:
            met[bpw] = find(bpw)
        except UserError as error:
            failures[bpw] = error
    if not met:
        raise failures[budgets[0]]
    # a sentence that names its budget says so in bytes, too, where the user did
    return met, [str(e) if f"{bpw:.2f} bpw" in str(e) else f"{bpw:g} bpw: {e}" for bpw, e in failures.items()]


def spend(
    knapsack: Knapsack,
    budget: int,
    weights: Mapping[str, float],
    floors: Mapping[str, float] | None = None,
    allowed: Allowed | None = None,
    tied: Sequence[Sequence[str]] = (),
    top: int = 3,
    asked: float | None = None,
    loadable: Allowed | None = None,
) -> list[Candidate]:
    """The best few plans of at most so many bits, by the weighted mean of the tasks' shares of full precision.

    `asked` is the budget in bits per weight as the user gave it, which candidates keep and reports show.
    """
    program = Program(knapsack, intersection(loadable, allowed), tied)
    program.at_most(budget - knapsack.kept)
    program.limit_run_time()
    if not all(knapsack.models[task].is_formula for task in {*weights, *(floors or {})}):
        rows = best_of_compared(program, weights, floors or {}, budget, top)
    else:
        for name, share in (floors or {}).items():
            program.keep(name, share)
        if len(weights) == 1:
            rows = _one_task(program, next(iter(weights)), budget, top)
        else:
            rows = _several_tasks(program, weights, budget, top)
    if not rows:
        raise infeasible(knapsack, budget, floors or {}, allowed, tied, loadable)
    plans = [knapsack.space.decode(row) for row in rows]
    limit = budget / knapsack.parts.numel if asked is None else asked
    return [
        Candidate(plan, knapsack.size(plan), limit, rank, predicted)
        for rank, (plan, predicted) in enumerate(zip(plans, knapsack.predicted(plans), strict=True))
    ]


def fits(knapsack: Knapsack, row: Floats, budget: int) -> bool:
    """Whether a plan keeps to the budget in bits and to all limits; checked, since HiGHS tolerates a small excess."""
    plan = knapsack.space.decode(row)
    limits = knapsack.limits
    return knapsack.size(plan).bits <= budget and (limits is None or limits.hold(knapsack.parts, plan))


def _one_task(program: Program, task: str, budget: int, top: int) -> list[Floats]:
    """The best plans for one task: the score falls with the damage, so the least damage is the best score."""
    rows: list[Floats] = []
    cost = program.damage(task)
    while len(rows) < top and (best := program.minimize(cost)) is not None:
        program.exclude(best[0])
        if fits(program.knapsack, best[0], budget):
            rows.append(best[0])
    return rows


def _several_tasks(program: Program, weights: Mapping[str, float], budget: int, top: int) -> list[Floats]:
    """The best plans for several tasks: solved in the order of an upper bound, each then scored exactly.

    The bound is made tight around the first plan that is found: of a loose one, thousands of nearly equal plans lie
    above the best score. The search ends when no remaining plan has a bound above the score of plan number `top` by
    more than TIE, and so is exact but for ties, although the program maximizes only a bound. It also ends after MOST
    further plans: then hundreds lie closer to the best score than the bound is tight (.0005 where that was seen).
    """
    knapsack = program.knapsack
    total = sum(weights.values())
    weights = {task: weight / total for task, weight in weights.items()}
    loose = program.copy()
    if (first := loose.minimize(loose.bound(weights), GAP)) is None:
        return []
    cost = program.bound(weights, first[0])
    scored: list[tuple[float, Floats]] = []
    while len(scored) < top + MOST and (best := program.minimize(cost, GAP)) is not None:
        row, bound = best[0], -best[1]
        if len(scored) >= top and bound <= scored[top - 1][0] + TIE:
            break
        program.exclude(row)
        if fits(knapsack, row, budget):
            value = sum(
                w * float(knapsack.models[t].predict(row[None])[0]) / knapsack.full(t) for t, w in weights.items()
            )
            scored = sorted([*scored, (value, row)], key=lambda pair: -pair[0])
    return [row for _, row in scored[:top]]


def best_uniform(
    knapsack: Knapsack,
    budget: float,
    weights: Mapping[str, float],
    floors: Mapping[str, float] | None = None,
    fits: Callable[[Plan], bool] = lambda plan: True,
) -> Candidate | None:
    """The uniform plan that is predicted to score best within a budget in bpw and under these conditions, if any."""
    parts = knapsack.parts
    shared = set.intersection(*(set(options) for options in knapsack.space.choices))
    plans = [Plan.uniform(parts, choice) for choice in sorted(shared, key=str)]
    plans = [plan for plan in plans if knapsack.size(plan).bits <= budget_bits(parts, budget) and fits(plan)]
    if knapsack.limits is not None:
        plans = [plan for plan in plans if knapsack.limits.hold(parts, plan)]
    candidates = [
        Candidate(plan, knapsack.size(plan), budget, 0, predicted)
        for plan, predicted in zip(plans, knapsack.predicted(plans), strict=True)
        if all(predicted[task].score >= share * predicted[task].full for task, share in (floors or {}).items())
    ]
    return max(candidates, key=lambda one: mean_share(one.predicted, weights), default=None)


def best_of_each(
    knapsacks: Sequence[Knapsack], best: Callable[[Knapsack], list[Candidate]], top: int
) -> list[Candidate]:
    """The best few plans by each of these knapsacks in turn, whose surrogates may start from different expectations.

    A plan's prediction is the mean of theirs, and its interval holds theirs.
    """
    lists, failures = [], []
    for knapsack in knapsacks:
        try:
            lists.append(best(knapsack))
        except UserError as error:  # such as a floor that one of them predicts no plan to keep
            failures.append(error)
    if not lists:
        raise failures[0]
    in_turn = {one.plan: one for ranked in zip_longest(*lists) for one in ranked if one is not None}
    chosen = list(in_turn.values())[:top]
    predictions = zip(*(knapsack.predicted([one.plan for one in chosen]) for knapsack in knapsacks), strict=True)
    return [
        replace(one, rank=rank, predicted={task: mean_of([by[task] for by in each]) for task in each[0]})
        for rank, (one, each) in enumerate(zip(chosen, predictions, strict=True))
    ]


def mean_share(predicted: Mapping[str, Predicted], weights: Mapping[str, float]) -> float:
    """The weighted mean over tasks of the predicted score as a share of full precision's."""
    shares = [predicted[task].score / predicted[task].full * weight for task, weight in weights.items()]
    return sum(shares) / sum(weights.values())


def as_measured(predicted: Mapping[str, Predicted], weights: Mapping[str, float]) -> Predicted:
    """The prediction on the scale of measurements: one task's score, or the weighted mean of the shares of several."""
    if len(weights) == 1:
        return predicted[next(iter(weights))]
    each = [(predicted[task], weight / sum(weights.values())) for task, weight in weights.items()]
    score, low, high = (sum(w * float(getattr(p, name)) / p.full for p, w in each) for name in ("score", "low", "high"))
    return Predicted(score, low, high, 1.0)
