"""LISTS: searches that list all plans beforehand (grid, one-at-a-time, random); `plans` finds any search by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sensitivity.analysis.search.samplers import SAMPLERS, sampled_plans
from sensitivity.analysis.search.search_space import SearchSpace
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.limits import Allowed
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study

MAX_GRID = 20_000  # plans; a larger grid would hardly ever be finished
Plans = Iterable[Plan] | Callable[[Study], Iterable[Plan]]


def grid(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
    """Every combination of schemes over components, and full precision.

    The first component of the forward pass varies slowest, so that successive plans share the hidden states before
    the first component in which they differ.
    """
    return LISTS["grid"](SearchSpace.of(parts, schemes), 0, 0)


def one_at_a_time(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
    """Full precision; the uniform plans; and each component alone at each width, the others native where allowed."""
    return LISTS["one-at-a-time"](SearchSpace.of(parts, schemes), 0, 0)


def _grid(space: SearchSpace, trials: int, seed: int) -> list[Plan]:
    # from the narrowest scheme to the widest; native only on an axis that allows nothing else
    choices = [range(len(options) - 1, min(1, len(options) - 1) - 1, -1) for options in space.joint.choices]
    if (count := math.prod(map(len, choices)) + 1) > MAX_GRID:
        raise UserError(_too_many(choices, count))
    return list(dict.fromkeys([space.native, *map(space.plan, itertools.product(*choices))]))


def _too_many(choices: Sequence[Sequence[int]], count: int) -> str:
    fewer = int(MAX_GRID ** (1 / len(choices)))
    hint = f"at most {fewer} widths (--bits)" if fewer > 1 else "a single width"
    shown = f"{count:,}" if count < 10**9 else f"about 10^{round(math.log10(count))}"
    return (
        f"a grid of {max(map(len, choices))} widths over {len(choices)} components has {shown} plans, more than "
        f"{MAX_GRID:,}; choose coarser parts (--by part), {hint}, or let a search choose "
        "(--search frontier --trials 200)"
    )


def _one_at_a_time(space: SearchSpace, trials: int, seed: int) -> list[Plan]:
    rows = [
        [i if axis == varied else first for axis, first in enumerate(space.low)]
        for varied, options in enumerate(space.joint.choices)
        for i in range(len(options) - 1, 0, -1)
    ]
    return list(dict.fromkeys([space.native, *map(space.plan, [*reversed(space.uniform()), *rows])]))


def _random(space: SearchSpace, trials: int, seed: int) -> list[Plan]:
    """Full precision and distinct plans drawn evenly, native among the choices; the same seed gives the same plans."""
    counts = [len(options) for options in space.joint.choices]
    possible = math.prod(n - first for n, first in zip(counts, space.low, strict=True))
    trials = min(trials, possible + any(space.low))  # full precision is always in the list
    draw = np.random.default_rng(seed)
    plans = dict.fromkeys([space.native])
    while len(plans) < trials:
        plans[space.plan(draw.integers(space.low, counts))] = None
    # neighbors in this order agree in their first components, whose hidden states they then share
    return sorted(plans, key=lambda plan: [-b for b in plan.bits().values()])


# name -> a function of search space, number of plans and seed that returns all plans
LISTS: dict[str, Callable[[SearchSpace, int, int], list[Plan]]] = {
    "grid": _grid,
    "one-at-a-time": _one_at_a_time,
    "random": _random,
}


def plans(
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    search: str = "grid",
    trials: int | None = None,
    seed: int = 0,
    allowed: Allowed | None = None,
    tied: Sequence[Sequence[str]] = (),
    format: str | None = None,
) -> Plans:
    """The plans of a search: a list, or a function that yields each plan after the last one was measured.

    `format`: in whose files a search counts sizes.
    """
    check_search(search)
    if trials is not None and trials < 1:
        raise UserError(f"a search needs at least one trial (--trials), not {trials}")
    space = SearchSpace.of(parts, schemes, allowed, tied, format)
    if search in LISTS:
        return LISTS[search](space, trials or 100, seed)[:trials]
    return lambda study: sampled_plans(study, space, search, trials or 100, seed)


def check_search(search: str) -> None:
    """Raise an error where no search has this name."""
    if search not in LISTS and search not in SAMPLERS:
        raise unknown("search", search, [*LISTS, *SAMPLERS])
