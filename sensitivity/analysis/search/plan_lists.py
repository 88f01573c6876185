"""Plan sources: which plans to try, all at once (grid, one-at-a-time, random) or one after the other (SAMPLERS)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sensitivity.analysis.search.samplers import SAMPLERS, searching
from sensitivity.analysis.search.search_space import SearchSpace
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.limits import Allowed
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study

LARGEST = 20_000  # plans in a grid; beyond it nobody waits for the end


Plans = Iterable[Plan] | Callable[[Study], Iterable[Plan]]


def grid(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
    """Every combination of schemes over components, and full precision.

    In data-flow order, the first component varying slowest, so that neighbors share their first stages.
    """
    return LISTS["grid"](SearchSpace.of(parts, schemes), 0, 0)


def one_at_a_time(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
    """Full precision; the uniform plans; and each component alone at each width, the others as wide as may be."""
    return LISTS["one-at-a-time"](SearchSpace.of(parts, schemes), 0, 0)


def _grid(ground: SearchSpace, trials: int, seed: int) -> list[Plan]:
    choices = [range(len(options) - 1, min(1, len(options) - 1) - 1, -1) for options in ground.joint.choices]
    if (count := math.prod(map(len, choices)) + 1) > LARGEST:
        raise UserError(_too_many(choices, count))
    return list(dict.fromkeys([ground.native, *map(ground.plan, itertools.product(*choices))]))


def _too_many(choices: Sequence[Sequence[int]], count: int) -> str:
    fewer = int(LARGEST ** (1 / len(choices)))
    hint = f"at most {fewer} widths (--bits)" if fewer > 1 else "a single width"
    shown = f"{count:,}" if count < 10**9 else f"about 10^{round(math.log10(count))}"
    return (
        f"a grid of {max(map(len, choices))} widths over {len(choices)} components has {shown} plans, more than "
        f"{LARGEST:,}; choose coarser parts (--by part), {hint}, or let a search choose "
        "(--search frontier --trials 200)"
    )


def _one_at_a_time(ground: SearchSpace, trials: int, seed: int) -> list[Plan]:
    rows = [
        [i if axis == chosen else first for axis, first in enumerate(ground.low)]
        for chosen, options in enumerate(ground.joint.choices)
        for i in range(len(options) - 1, 0, -1)
    ]
    return list(dict.fromkeys([ground.native, *map(ground.plan, [*reversed(ground.uniform()), *rows])]))


def _random(ground: SearchSpace, trials: int, seed: int) -> list[Plan]:
    """Different plans drawn evenly, native among the choices, after full precision; the same seed draws the same."""
    counts = [len(options) for options in ground.joint.choices]
    possible = math.prod(n - first for n, first in zip(counts, ground.low, strict=True))
    trials = min(trials, possible + any(ground.low))  # full precision is there whether it may be drawn or not
    draw = np.random.default_rng(seed)
    plans = dict.fromkeys([ground.native])
    while len(plans) < trials:
        plans[ground.plan(draw.integers(ground.low, counts))] = None
    return sorted(plans, key=lambda plan: [-b for b in plan.bits().values()])


# name -> all its plans at once: where it may walk, how many plans, seed
LISTS: dict[str, Callable[[SearchSpace, int, int], list[Plan]]] = {
    "grid": _grid,
    "one-at-a-time": _one_at_a_time,
    "random": _random,
}


def plans(
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    how: str = "grid",
    trials: int | None = None,
    seed: int = 0,
    allowed: Allowed | None = None,
    tied: Sequence[Sequence[str]] = (),
) -> Plans:
    """What to try: a list where all plans are known beforehand; otherwise each is chosen when the last one is told."""
    known(how)
    if trials is not None and trials < 1:
        raise UserError(f"a search needs at least one trial (--trials), not {trials}")
    ground = SearchSpace.of(parts, schemes, allowed, tied)
    if how in LISTS:
        return LISTS[how](ground, trials or 100, seed)[:trials]
    return lambda study: searching(study, ground, how, trials or 100, seed)


def known(how: str) -> None:
    if how not in LISTS and how not in SAMPLERS:
        raise unknown("search", how, [*LISTS, *SAMPLERS])
