"""Errors for conditions that no plan meets, which say what budget, floor or time can be reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.program import Program
from sensitivity.analysis.allocate.run_time_limits import RunTimeLimits, cost_in_words
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed, intersection
from sensitivity.spec.sizes import bytes_in_words


class NothingFits(UserError):
    """The error for a budget that no plan fits: a sentence whose subject says which plans there are."""

    def __init__(self, subject: str, predicate: str) -> None:
        super().__init__(f"{subject} {predicate}")
        self.predicate = predicate


def infeasible(
    knapsack: Knapsack,
    budget: int,
    floors: Mapping[str, float],
    allowed: Allowed | None,
    tied: Sequence[Sequence[str]],
    loadable: Allowed | None = None,
    measured: bool = True,
) -> UserError:
    """The error for constraints that no plan meets, which says what size or floor can be reached.

    allowed: what the user allows, and loadable: what the runtime does. measured: whether plans are those of a study.
    """
    numel = knapsack.parts.numel
    choices = intersection(loadable, allowed)
    program = Program(knapsack, choices, tied)
    weights = np.concatenate(knapsack.bits) / numel
    # without the budget and the floors: the smallest and the largest plan that the other constraints allow
    smallest = program.minimize(dict(enumerate(weights)))
    largest = program.minimize(dict(enumerate(-weights)))
    if smallest is None or largest is None:
        return UserError("no plan obeys these constraints: components that must share have no width in common")
    low, high = (knapsack.size(knapsack.space.decode(row)).bits for row, _ in (smallest, largest))
    if low > budget:
        asked = reached = ""
        if knapsack.parts.sized:
            files = f" in {knapsack.format} files" if knapsack.format else ""
            asked = f" ({bytes_in_words(budget / 8)})"
            reached = f" ({bytes_in_words(low / 8)} to {bytes_in_words(high / 8)}{files})"
        advice = f"{'sweep' if measured else 'give'} lower widths (--bits)"
        if allowed is not None:
            unlimited = Program(knapsack, loadable, tied).minimize(dict(enumerate(weights)))
            if unlimited is not None and knapsack.size(knapsack.space.decode(unlimited[0])).bits < low:
                advice = "allow lower widths (--allow)"
        return NothingFits(
            "no measured plan" if measured else "no plan",
            f"fits {budget / numel:.2f} bpw{asked}: with these widths, {low / numel:.2f} to {high / numel:.2f} "
            f"bpw{reached} can be reached; ask for more, or {advice}",
        )
    if knapsack.limits is not None:
        return UserError(_too_slow(knapsack, knapsack.limits, choices, tied, f"{budget / numel:.2f} bpw"))
    # a small enough plan exists, so a floor fails: find the smallest plan that keeps all floors
    needed = Program(knapsack, choices, tied)
    for name, share in floors.items():
        needed.keep(name, share)
    kept = " and ".join(f"{name} at {100 * share:.4g}%" for name, share in floors.items())
    smallest_kept = needed.minimize(dict(enumerate(weights)))
    if smallest_kept is None:
        return UserError(f"no measured plan is predicted to keep {kept} of full precision, at any size")
    least = knapsack.size(knapsack.space.decode(smallest_kept[0])).bits / numel
    return UserError(
        f"no plan of at most {budget / numel:.2f} bpw is predicted to keep {kept} of full precision; by "
        f"prediction, that takes {least:.2f} bpw, or lower the floor"
    )


def _too_slow(
    knapsack: Knapsack, limits: RunTimeLimits, allowed: Allowed | None, tied: Sequence[Sequence[str]], budget: str
) -> str:
    """Which limit no plan meets, and what can be reached; or that they cannot be met together."""
    for cost, (costs, _) in limits.rows(knapsack.parts, knapsack.space).items():
        program = Program(knapsack, allowed, tied)
        program.limit(costs, np.inf)  # forbids what was never timed
        least = program.minimize(dict(enumerate(np.nan_to_num(costs))))
        assert least is not None  # full precision is always timed
        reached = limits.times.fixed_cost(cost) + least[1]
        if reached > limits.most[cost]:
            return (
                f"no measured plan takes at most {cost_in_words(cost, limits.most[cost])} in {limits.times.runtime} on "
                f"this machine: {cost_in_words(cost, reached)} can be reached; ask for more"
            )
    asked = " and ".join(cost_in_words(cost, most) for cost, most in limits.most.items())
    return f"no measured plan meets {budget}, {asked} and every floor at once; ask for more of one of them"
