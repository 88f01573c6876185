"""Compares plans one by one, for surrogates whose score is not a function of the total damage alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.program import Program

Floats = np.ndarray
MAX_COMPARED = 50_000  # of a space with at most so many plans, all are compared
STARTS = 12  # plans of least damage, whose neighbors in a larger space are compared


def best_of_compared(
    program: Program, weights: Mapping[str, float], floors: Mapping[str, float], budget: int, top: int
) -> list[Floats]:
    """The best plans of at most so many bits, by the weighted mean of predicted shares of full precision.

    The result is exact for spaces of at most MAX_COMPARED plans. Of a larger one, the plans of least damage, the
    measured ones and all that differ from these in one component are compared.
    """
    knapsack = program.knapsack
    rows = (
        _every_plan(program) if math.prod(program.counts) <= MAX_COMPARED else _near_the_best(program, weights, budget)
    )
    rows = rows[program.allows(rows)]
    bits = sum(sizes[rows[:, c]] for c, sizes in enumerate(knapsack.bits)) + knapsack.kept
    rows = rows[bits <= budget]
    if not len(rows):
        return []
    shares = {task: knapsack.models[task].predict(rows) / (knapsack.full(task) or 1.0) for task in {*weights, *floors}}
    kept = np.all([shares[task] >= share for task, share in floors.items()], axis=0) if floors else np.ones(len(rows))
    score = sum(weight * shares[task] for task, weight in weights.items())
    order = np.lexsort([bits[bits <= budget], -np.asarray(score)])
    return [rows[i] for i in order if kept[i]][:top]


def _every_plan(program: Program) -> Floats:
    """All rows of positions."""
    return np.stack(np.meshgrid(*map(np.arange, program.counts), indexing="ij"), -1).reshape(-1, len(program.counts))


def _near_the_best(program: Program, weights: Mapping[str, float], budget: int) -> Floats:
    """The plans of least damage for each task, the measured plans, and all that differ from them in one component."""
    rows = [row for task in weights for row in _least_damage(program, task)]
    rows += [row for task in weights for row in _measured(program.knapsack, task)]
    groups = [np.array(rows)]
    for c, count in enumerate(program.counts):
        for choice in range(count):
            neighbors = groups[0].copy()
            neighbors[:, c] = choice
            groups.append(neighbors)
    return np.unique(np.concatenate(groups), axis=0)


def _least_damage(program: Program, task: str) -> list[Floats]:
    """The plans that do least damage by the formula alone and meet the constraints."""
    cost, found = program.damage(task), []
    constraints = len(program.rows)
    for _ in itertools.repeat(None, STARTS):
        if (best := program.minimize(cost)) is None:
            break
        program.exclude(best[0])
        found.append(best[0])
    del program.rows[constraints:]  # plans were excluded only to find the next ones
    return found


def _measured(knapsack: Knapsack, task: str) -> Floats:
    """The measured plans as rows, as far as the surrogate keeps them."""
    misfit = knapsack.models[task].misfit
    return np.zeros((0, len(knapsack.space.names)), dtype=int) if misfit is None else misfit.index
