"""The space of a search: one axis per component, or per group of components that share a scheme."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import NSGAIISampler

from sensitivity.analysis.search.frontier_sampler import PlanSizes
from sensitivity.analysis.surrogate.space import Expected, Space, summed_over_axes
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.limits import Allowed
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme
from sensitivity.spec.sizes import choice_bits, kept_bits

POPULATION = 20  # plans per generation of NSGA-II


@dataclass(frozen=True)
class SearchSpace:
    """The plans that a search may propose: an axis per component, or per group of components that share their scheme.

    Every axis begins with native, even where it is not allowed: full precision is measured anyway, and needs a row.
    `low` is the first position that may be proposed: 1 where native is not allowed, else 0.
    """

    names: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    joint: Space  # one axis as if it were one component: the space of the surrogate
    low: tuple[int, ...]
    sizes: PlanSizes
    cached: frozenset[str] = frozenset()  # the components that have a key-value cache
    expected: Expected | None = None  # damages of each axis that are known before any score

    @classmethod
    def of(
        cls,
        parts: ComponentMap,
        schemes: Sequence[Scheme],
        allowed: Allowed | None = None,
        tied: Sequence[Sequence[str]] = (),
        format: str | None = None,
    ) -> SearchSpace:
        """The space of these schemes; an axis has those that are allowed for all of its components.

        Sizes are those in the files of `format`.
        """
        if not schemes:
            raise UserError("no widths given; name some, such as --bits 2,3,4,6,8 (in Python, bits=(2, 3, 4, 6, 8))")
        ordered = sorted(set(schemes), key=_scheme_order)
        if any(scheme.cache != NOT_ROUNDED for scheme in ordered) and not any(c.has_cache for c in parts.components):
            raise UserError(f"{parts.model} has no layers of keys and values to round; leave out --cache-bits")
        axes, choices, low = [], [], []
        for group in _groups(parts.names, tied):
            # a group without a cache has the same plan at all widths of the cache
            cached = any(parts[name].has_cache for name in group)
            every = dict.fromkeys((None, *(scheme if cached else scheme.without_cache for scheme in ordered)))
            permitted = [c for c in every if allowed is None or all(allowed(name, c) for name in group)]
            if not permitted:
                raise UserError(f"no scheme is allowed for {', '.join(group)}; there are native, {_listed(ordered)}")
            axes.append(group)
            choices.append((None, *(choice for choice in permitted if choice is not None)))
            low.append(int(permitted[0] is not None))
        bits = tuple(np.array(b, dtype=float) for b in choice_bits(parts, axes, choices, format))
        joint = Space(tuple("+".join(group) for group in axes), tuple(choices))
        sizes = PlanSizes(bits, kept_bits(parts, format), parts.numel)
        with_cache = frozenset(component.name for component in parts.components if component.has_cache)
        return cls(parts.names, tuple(axes), joint, tuple(low), sizes, with_cache)

    def expecting(self, damages: Expected | None) -> SearchSpace:
        """This space, with what is expected of the components of each axis."""
        if damages is None:
            return self
        return replace(self, expected=summed_over_axes(damages, self.axes, self.joint.names))

    @property
    def native(self) -> Plan:
        """The plan that quantizes nothing, which a sweep measures even where it is not allowed as a choice."""
        return Plan(tuple((name, None) for name in self.names))

    def uniform(self) -> list[list[int]]:
        """Rows of the uniform plans, widest first; components without a cache have the scheme without cache bits."""
        return self.joint.uniform()

    def row(self, plan: Plan) -> list[int] | None:
        """A plan as positions on the axes; None where it lies outside this space (a study may hold other plans)."""
        row = []
        for names, options in zip(self.axes, self.joint.choices, strict=True):
            fitting = (
                i for i, one in enumerate(options) if all(self._fitted(name, one) == plan[name] for name in names)
            )
            if (place := next(fitting, None)) is None:
                return None
            row.append(place)
        return row

    def _fitted(self, name: str, choice: Scheme | None) -> Scheme | None:
        """A component's scheme for a choice of its axis: without cache rounding if the component has no cache."""
        return choice if choice is None or name in self.cached else choice.without_cache

    def plan(self, row: Sequence[int] | np.ndarray) -> Plan:
        """The plan at these positions on the axes."""
        chosen = {
            name: self._fitted(name, options[i])
            for names, options, i in zip(self.axes, self.joint.choices, row, strict=True)
            for name in names
        }
        return Plan(tuple((name, chosen[name]) for name in self.names))

    def distributions(self, low: Sequence[int]) -> dict[str, BaseDistribution]:
        """Optuna's parameters: an integer per axis, from `low` to its last choice."""
        sizes = [len(options) for options in self.joint.choices]
        return {
            name: IntDistribution(first, count - 1)
            for name, first, count in zip(self.joint.names, low, sizes, strict=True)
        }

    def finished_trial(self, row: Sequence[int], values: Sequence[float], place: int) -> optuna.trial.FrozenTrial:
        """A measured plan as a finished trial of the mirror study.

        NSGA-II selects parents among trials that carry a generation, which it writes only to those it proposed itself.
        """
        return optuna.trial.create_trial(
            params=dict(zip(self.joint.names, row, strict=True)),
            values=list(values),
            distributions=self.distributions([0] * len(row)),
            system_attrs={NSGAIISampler._get_generation_key(): place // POPULATION},
        )

    def ask(self, mirror: optuna.Study, seen: set[str], seed: int) -> tuple[Plan, optuna.Trial | None]:
        """A plan that was not measured yet; a random one if the sampler proposes measured plans ten times in a row."""
        for _ in range(10):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna's notes on experimental features: nothing to act on
                trial = mirror.ask(self.distributions(self.low))
            plan = self.plan([trial.params[name] for name in self.joint.names])
            if plan.key not in seen:
                return plan, trial
            mirror.tell(trial, state=optuna.trial.TrialState.FAIL)  # else the mirror would hold it as running
        draw = np.random.default_rng(seed)
        while True:  # ends, since the caller checks `exhausted` first
            row = [int(draw.integers(a, len(o))) for a, o in zip(self.low, self.joint.choices, strict=True)]
            if (plan := self.plan(row)).key not in seen:
                return plan, None

    def exhausted(self, seen: set[str]) -> bool:
        """Whether every plan of this space was measured."""
        counts = [len(options) - first for options, first in zip(self.joint.choices, self.low, strict=True)]
        if math.prod(counts) > len(seen):
            return False
        # enough plans were measured, but some of them may lie outside this space
        rows = itertools.product(*(range(a, len(o)) for a, o in zip(self.low, self.joint.choices, strict=True)))
        return all(self.plan(row).key in seen for row in rows)


def _scheme_order(scheme: Scheme) -> tuple[object, ...]:
    """Sort key of schemes: by method and settings, each from the widest to the narrowest."""
    rounded = -scheme.activations, -scheme.cache
    return scheme.method, str(scheme.group), scheme.symmetric, scheme.settings, *rounded, -scheme.bits


def _listed(schemes: Sequence[Scheme]) -> str:
    return ", ".join(map(str, schemes))


def _groups(names: Sequence[str], tied: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The axes: each tied group at the place of its first member, every other component by itself."""
    groups = [tuple(group) for group in tied]
    for name in (name for group in groups for name in group):
        if name not in names:
            raise unknown("component", name, names)
        if sum(name in group for group in groups) > 1:
            raise UserError(f"{name} is tied twice; put all components that must share into one group")
    owner = {name: next((group for group in groups if name in group), (name,)) for name in names}
    return list(dict.fromkeys(owner[name] for name in names))
