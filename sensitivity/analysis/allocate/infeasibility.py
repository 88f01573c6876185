"""Why no plan fits: which size, time or floor can be reached instead, and what else would help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.program import Program
from sensitivity.analysis.allocate.run_time_limits import RunTimeLimits, cost_in_words
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed, intersection
from sensitivity.spec.sizes import bytes_in_words, component_bits, kept_bits

LOWEST = 2  # bits to which advice goes: few methods take one bit


class NothingFits(UserError):
    """The error for a budget that no plan fits, and what follows `no plan` in its sentence."""

    def __init__(self, predicate: str) -> None:
        super().__init__(f"no plan {predicate}")
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
        advice = _what_would_fit(knapsack, budget, allowed, tied, loadable, measured)
        widths = "the measured widths" if measured else "these widths"
        return NothingFits(
            f"fits {budget / numel:.2f} bpw{asked}: with {widths}, {_at_least(low / numel)} to {high / numel:.2f} "
            f"bpw{reached} can be reached; ask for more{advice and f', or {advice}'}"
        )
    if knapsack.limits is not None:
        return UserError(_too_slow(knapsack, knapsack.limits, choices, tied, f"{budget / numel:.2f} bpw"))
    # a small enough plan exists, so a floor fails: find the smallest plan that keeps all floors
    needed = Program(knapsack, choices, tied)
    for name, share in floors.items():
        needed.keep(name, share)
    kept = " and ".join(f"{name} at {100 * share:.4g} %" for name, share in floors.items())
    smallest_kept = needed.minimize(dict(enumerate(weights)))
    if smallest_kept is None:
        return UserError(f"no plan of the measured widths is predicted to keep {kept} of full precision, at any size")
    least = knapsack.size(knapsack.space.decode(smallest_kept[0])).bits / numel
    return UserError(
        f"no plan of at most {budget / numel:.2f} bpw is predicted to keep {kept} of full precision; by "
        f"prediction, that takes {_at_least(least)} bpw, or lower the floor"
    )


def _at_least(bpw: float) -> str:
    """A size with two decimals that, typed as a budget, is large enough."""
    return f"{math.ceil(100 * bpw - 1e-9) / 100:.2f}"


def _what_would_fit(
    knapsack: Knapsack,
    budget: int,
    allowed: Allowed | None,
    tied: Sequence[Sequence[str]],
    loadable: Allowed | None,
    measured: bool,
) -> str:
    """What else than a larger budget would let a plan fit, as advice; an empty string where nothing of it would."""
    if allowed is not None:
        cost = dict(enumerate(np.concatenate(knapsack.bits)))
        unlimited = Program(knapsack, loadable, tied).minimize(cost)
        if unlimited is not None and knapsack.size(knapsack.space.decode(unlimited[0])).bits <= budget:
            return "allow lower widths (--allow)"
    if _least_bits(knapsack, intersection(loadable, allowed), knapsack.format) <= budget:
        return f"{'sweep' if measured else 'give'} lower widths (--bits)"
    held = loadable is not None or knapsack.format is not None
    if held and _least_bits(knapsack, allowed, None) <= budget:
        files = f"in {knapsack.format} files" if knapsack.format else "in this one"
        return f"name another runtime or format: {files}, no lower widths would be small enough"
    return ""


def _least_bits(knapsack: Knapsack, allowed: Allowed | None, format: str | None) -> int:
    """The bits of the smallest plan, if the methods at hand had any width from LOWEST up."""
    parts, least = knapsack.parts, kept_bits(knapsack.parts, format)
    for name, options in zip(knapsack.space.names, knapsack.space.choices, strict=True):
        lower = [replace(one, bits=bits) for one in options if one is not None for bits in range(LOWEST, one.bits)]
        choices = [one for one in (*options, *lower) if allowed is None or allowed(name, one)]
        least += min((component_bits(parts, name, one, format) for one in choices), default=0)
    return least


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
                f"no plan of the measured widths takes at most {cost_in_words(cost, limits.most[cost])} in "
                f"{limits.times.runtime} on this machine: {cost_in_words(cost, reached)} can be reached; ask for more"
            )
    asked = " and ".join(cost_in_words(cost, most) for cost, most in limits.most.items())
    return (
        f"no plan of the measured widths meets {budget}, {asked} and every floor at once; ask for more of one of them"
    )
