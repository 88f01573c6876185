"""The best plan within a budget by additive scores alone, such as those from calibration, before any plan has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sensitivity.analysis.allocate.budget import fits, of_met
from sensitivity.analysis.allocate.infeasibility import infeasible
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.program import Program
from sensitivity.analysis.surrogate.space import Space, family
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed, intersection, merge_groups
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.loadable import searches
from sensitivity.spec.runtimes.rules import tied
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import budget_bits

Scores = Mapping[str, Mapping[Scheme, float]]  # component -> scheme -> damage


def optimum(
    parts: ComponentMap,
    scores: Scores,
    bpw: float,
    runtime: str | None = None,
    allow: Allowed | None = None,
    tie: Sequence[Sequence[str]] = (),
) -> Plan:
    """The plan of at most so many bits per weight with the least sum of scores; with `runtime`, one that it can load.

    Within a family, a narrower scheme counts for at least the damage of a wider one; a lower score is noise.
    """
    schemes = list(dict.fromkeys(scheme for one in scores.values() for scheme in one))
    knapsack = Knapsack.build(parts, Space.of([Plan.uniform(parts, None)], scores), {}, files_of(runtime))
    damages = rising(knapsack.space, scores)
    ways = searches(parts, runtime, schemes) if runtime else [None]
    together = merge_groups([*tied(parts, runtime), *tie]) if runtime else tie
    solutions, failure = [], None
    for way in ways:
        try:
            solutions.append(_solved(knapsack, damages, budget_bits(parts, bpw), way, allow, together))
        except UserError as error:
            failure = failure or error
    if not solutions:
        assert failure is not None
        raise failure
    return knapsack.space.decode(min(solutions, key=lambda one: one[1])[0])


def met_budgets(
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    budgets: Sequence[float],
    runtime: str | None = None,
    allow: Allowed | None = None,
    tie: Sequence[Sequence[str]] = (),
) -> tuple[tuple[float, ...], list[str]]:
    """The budgets in bits per weight that some plan meets, and a sentence for each other one.

    Where no budget can be met, that is an error.
    """
    no_damage = {name: dict.fromkeys(schemes, 0.0) for name in parts.names}
    met, unmet = of_met(budgets, lambda bpw: optimum(parts, no_damage, bpw, runtime, allow, tie))
    return tuple(met), unmet


def _solved(
    knapsack: Knapsack,
    damages: Sequence[np.ndarray],
    budget: int,
    loadable: Allowed | None,
    allow: Allowed | None,
    tie: Sequence[Sequence[str]],
) -> tuple[np.ndarray, float]:
    """The best row of choices within a budget in bits, and its damage."""
    program = Program(knapsack, intersection(loadable, allow), tie)
    program.at_most(budget - knapsack.kept)
    cost = dict(enumerate(np.concatenate(damages)))
    while (best := program.minimize(cost)) is not None:
        if fits(knapsack, best[0], budget):
            return best
        program.exclude(best[0])
    raise infeasible(knapsack, budget, {}, allow, tie, loadable, measured=False)


def rising(space: Space, scores: Scores) -> list[np.ndarray]:
    """Per component, the damage of each choice, native first; within a family, fewer bits never do less damage."""
    per_component = []
    for name, options in zip(space.names, space.choices, strict=True):
        damages, wider = [0.0], None
        for option in options[1:]:
            assert option is not None
            same_family = wider is not None and family(wider) == family(option)
            damages.append(max(scores[name].get(option, np.inf), damages[-1] if same_family else 0.0))
            wider = option
        per_component.append(np.array(damages))
    return per_component


def combined(scores: Sequence[Scores]) -> dict[str, dict[Scheme, float]]:
    """The geometric mean of several scores, each scaled to a mean logarithm of 0; 0 unless all of them are above 0."""
    means: dict[str, dict[Scheme, float]] = {}
    levels = [np.mean([np.log(v) for row in one.values() for v in row.values() if v > 0] or [0.0]) for one in scores]
    for name, row in scores[0].items():
        for scheme in row:
            values = [one[name][scheme] for one in scores]
            logs = [np.log(v) - level for v, level in zip(values, levels, strict=True) if v > 0]
            means.setdefault(name, {})[scheme] = float(np.exp(np.mean(logs))) if len(logs) == len(scores) else 0.0
    return means
