"""Plan sources: which plans to try, all at once (grid, one-at-a-time, random) or one after the other (SAMPLERS)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection

from sensitivity.components import ComponentMap
from sensitivity.errors import UserError, unknown
from sensitivity.frontier import FrontierSampler, Weights
from sensitivity.limits import Allowed
from sensitivity.plan import Plan, Scheme, component_bits, size
from sensitivity.surrogate import Space
from sensitivity.trials import Study

LARGEST = 20_000  # plans in a grid; beyond it nobody waits for the end


Plans = Iterable[Plan] | Callable[[Study], Iterable[Plan]]


def grid(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
    """Every combination of schemes over components, and full precision.

    In data-flow order, the first component varying slowest, so that neighbours share their first stages.
    """
    return LISTS["grid"](Ground.of(parts, schemes), 0, 0)


def one_at_a_time(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
    """Full precision; the uniform plans; and each component alone at each width, the others as wide as may be."""
    return LISTS["one-at-a-time"](Ground.of(parts, schemes), 0, 0)


def _grid(ground: Ground, trials: int, seed: int) -> list[Plan]:
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


def _one_at_a_time(ground: Ground, trials: int, seed: int) -> list[Plan]:
    rows = [
        [i if axis == chosen else first for axis, first in enumerate(ground.low)]
        for chosen, options in enumerate(ground.joint.choices)
        for i in range(len(options) - 1, 0, -1)
    ]
    return list(dict.fromkeys([ground.native, *map(ground.plan, [*reversed(ground.uniform()), *rows])]))


def _random(ground: Ground, trials: int, seed: int) -> list[Plan]:
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
LISTS: dict[str, Callable[[Ground, int, int], list[Plan]]] = {
    "grid": _grid,
    "one-at-a-time": _one_at_a_time,
    "random": _random,
}

# -- one after the other --------------------------------------------------------------------------------------------

POPULATION = 20  # of NSGA-II
MAXIMIZE, MINIMIZE = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE

# name -> the sampler that asks for the next plan
SAMPLERS: dict[str, Callable[[Ground, int], BaseSampler]] = {
    "tpe": lambda ground, seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda ground, seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    "gp": lambda ground, seed: GPSampler(seed=seed, deterministic_objective=False),
    "frontier": lambda ground, seed: FrontierSampler(ground.joint, ground.weights, low=ground.low, seed=seed),
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
    ground = Ground.of(parts, schemes, allowed, tied)
    if how in LISTS:
        return LISTS[how](ground, trials or 100, seed)[:trials]
    return lambda study: searching(study, ground, how, trials or 100, seed)


def known(how: str) -> None:
    if how not in LISTS and how not in SAMPLERS:
        raise unknown("search", how, [*LISTS, *SAMPLERS])


def searching(study: Study, ground: Ground, search: str, trials: int, seed: int) -> Iterator[Plan]:
    """Plans to measure, each chosen after the last one was told, until the study holds so many.

    The sampler sees a mirror of the study in which parameters are positions among the allowed choices, so that what
    it asks for is allowed, and shared where parts must share, by construction. It is seeded anew for every plan: a
    resumed search goes on as if it had never stopped.
    """
    mirror = optuna.create_study(directions=[MAXIMIZE] * len(study.tasks) + [MINIMIZE])
    asked: dict[str, optuna.Trial] = {}
    seen: set[str] = set()
    while True:
        for trial in study.trials():
            key = trial.user_attrs["key"]
            if key in asked:
                mirror.tell(asked.pop(key), trial.values)
            elif key not in seen and (row := ground.row(Plan.from_json(trial.user_attrs["plan"]))) is not None:
                mirror.add_trial(ground.told(row, trial.values, len(mirror.get_trials(deepcopy=False))))
            seen.add(key)
        if len(seen) >= trials or ground.exhausted(seen):
            return
        mirror.sampler = SAMPLERS[search](ground, seed + len(seen))
        plan, ours = ground.ask(mirror, seen, seed + len(seen))
        if ours is not None:
            asked[plan.key] = ours
        yield plan


@dataclass(frozen=True)
class Ground:
    """Where a search may walk: one axis per component, or per group of components that must share their scheme.

    Every axis begins with native, which `low` leaves out where it is not allowed (1 instead of 0).
    """

    names: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    joint: Space
    low: tuple[int, ...]
    weights: Weights

    @classmethod
    def of(
        cls,
        parts: ComponentMap,
        schemes: Sequence[Scheme],
        allowed: Allowed | None = None,
        tied: Sequence[Sequence[str]] = (),
    ) -> Ground:
        if not schemes:
            raise UserError("no widths given; name some, such as --bits 2,3,4,6,8")
        ordered = sorted(set(schemes), key=lambda s: (s.method, str(s.group), s.symmetric, s.settings, -s.bits))
        axes, choices, low = [], [], []
        for group in _groups(parts.names, tied):
            fine = [c for c in (None, *ordered) if allowed is None or all(allowed(name, c) for name in group)]
            if not fine:
                raise UserError(f"no scheme is allowed for {', '.join(group)}; there are native, {_listed(ordered)}")
            axes.append(group)
            choices.append((None, *(choice for choice in fine if choice is not None)))
            low.append(int(fine[0] is not None))
        bits = tuple(
            np.array([sum(component_bits(parts, name, choice) for name in group) for choice in options], dtype=float)
            for group, options in zip(axes, choices, strict=True)
        )
        kept = size(parts, Plan.uniform(parts, None)).bits - sum(b[0] for b in bits)
        joint = Space(tuple("+".join(group) for group in axes), tuple(choices))
        return cls(parts.names, tuple(axes), joint, tuple(low), Weights(bits, float(kept), parts.numel))

    @property
    def native(self) -> Plan:
        """Full precision, which is measured whether it is allowed or not."""
        return Plan(tuple((name, None) for name in self.names))

    def uniform(self) -> list[list[int]]:
        """Rows of the plans that give every component the same scheme, widest first."""
        shared = [c for c in self.joint.choices[0] if c and all(c in options for options in self.joint.choices)]
        return [[options.index(choice) for options in self.joint.choices] for choice in shared]

    def row(self, plan: Plan) -> list[int] | None:
        """Positions of a plan; None for plans from elsewhere with schemes that are not ours."""
        row = []
        for names, options in zip(self.axes, self.joint.choices, strict=True):
            used = {plan[name] for name in names}
            if len(used) > 1 or (choice := used.pop()) not in options:
                return None
            row.append(options.index(choice))
        return row

    def plan(self, row: Sequence[int] | np.ndarray) -> Plan:
        chosen = {
            name: options[i]
            for names, options, i in zip(self.axes, self.joint.choices, row, strict=True)
            for name in names
        }
        return Plan(tuple((name, chosen[name]) for name in self.names))

    def distributions(self, low: Sequence[int]) -> dict[str, BaseDistribution]:
        sizes = [len(options) for options in self.joint.choices]
        return {
            name: IntDistribution(first, count - 1)
            for name, first, count in zip(self.joint.names, low, sizes, strict=True)
        }

    def told(self, row: Sequence[int], values: Sequence[float], place: int) -> optuna.trial.FrozenTrial:
        """A finished trial for the mirror; NSGA-II wants to know of which generation it was."""
        return optuna.trial.create_trial(
            params=dict(zip(self.joint.names, row, strict=True)),
            values=list(values),
            distributions=self.distributions([0] * len(row)),
            system_attrs={NSGAIISampler._get_generation_key(): place // POPULATION},
        )

    def ask(self, mirror: optuna.Study, seen: set[str], seed: int) -> tuple[Plan, optuna.Trial | None]:
        """A plan that was not measured yet; by lot where the sampler insists on what it knows."""
        for _ in range(10):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna's remarks on what is experimental are not for our users
                trial = mirror.ask(self.distributions(self.low))
            plan = self.plan([trial.params[name] for name in self.joint.names])
            if plan.key not in seen:
                return plan, trial
            mirror.tell(trial, state=optuna.trial.TrialState.FAIL)
        draw = np.random.default_rng(seed)
        while True:
            row = [int(draw.integers(a, len(o))) for a, o in zip(self.low, self.joint.choices, strict=True)]
            if (plan := self.plan(row)).key not in seen:
                return plan, None

    def exhausted(self, seen: set[str]) -> bool:
        counts = [len(options) - first for options, first in zip(self.joint.choices, self.low, strict=True)]
        if math.prod(counts) > len(seen):
            return False
        rows = itertools.product(*(range(a, len(o)) for a, o in zip(self.low, self.joint.choices, strict=True)))
        return all(self.plan(row).key in seen for row in rows)


def _listed(schemes: Sequence[Scheme]) -> str:
    return ", ".join(map(str, schemes))


def _groups(names: Sequence[str], tied: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Components that share, each group where its first member stands."""
    groups = [tuple(group) for group in tied]
    for name in (name for group in groups for name in group):
        if name not in names:
            raise unknown("component", name, names)
        if sum(name in group for group in groups) > 1:
            raise UserError(f"{name} is tied twice; put all components that must share into one group")
    owner = {name: next((group for group in groups if name in group), (name,)) for name in names}
    return list(dict.fromkeys(owner[name] for name in names))
