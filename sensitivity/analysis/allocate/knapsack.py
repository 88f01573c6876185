"""A multiple-choice knapsack with interacting pairs: one scheme per component, solved exactly by SciPy's HiGHS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.surrogate.surrogate import Choice, Space, Surrogate, learn
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.limits import Allowed
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import Size, component_bits, size
from sensitivity.spec.standard_output import silenced
from sensitivity.study.study import Study

Floats = np.ndarray
SEGMENTS = 24  # of the staircase of lines that bounds a task's score from above, where several tasks are weighed


@dataclass(frozen=True)
class Predicted:
    """What the surrogate expects of a plan on one task, with a 95 % interval of the expectation."""

    score: float
    low: float
    high: float
    full: float  # predicted for full precision

    def to_json(self) -> dict[str, float]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Knapsack:
    """The measured choices of a study, what they weigh (in a format's files), and one surrogate per task."""

    parts: ComponentMap
    space: Space
    bits: tuple[Floats, ...]  # per component, per choice
    models: dict[str, Surrogate]
    kept: int  # bits that no choice changes
    format: str | None = None

    @classmethod
    def of(cls, study: Study, tasks: Sequence[str], format: str | None = None) -> Knapsack:
        space = Space.of([Plan.from_json(trial.user_attrs["plan"]) for trial in study.measured()])
        models = {}
        for task in tasks:
            readings = observations_of(study, task)
            if not readings.full > 0:
                raise UserError(_nothing_to_lose(task, readings.full))
            models[task] = learn(space, space.encode(readings.plans), readings.score, readings.full, readings.noise)
        return cls.build(study.parts, space, models, format)

    @classmethod
    def build(
        cls, parts: ComponentMap, space: Space, models: Mapping[str, Surrogate], format: str | None = None
    ) -> Knapsack:
        bits = tuple(
            np.array([component_bits(parts, name, choice, format) for choice in options], dtype=float)
            for name, options in zip(space.names, space.choices, strict=True)
        )
        kept = size(parts, Plan.uniform(parts, None)).bits - int(sum(b[0] for b in bits))
        return cls(parts, space, bits, dict(models), kept, format)

    def size(self, plan: Plan) -> Size:
        return size(self.parts, plan, self.format)

    def full(self, task: str) -> float:
        """Full precision, as predicted."""
        return float(self.models[task].predict(np.zeros((1, len(self.space.names)), dtype=int))[0])

    def predicted(self, plans: Sequence[Plan]) -> list[dict[str, Predicted]]:
        if not plans:
            return []
        index = self.space.encode(plans)
        found: list[dict[str, Predicted]] = [{} for _ in plans]
        for task, model in self.models.items():
            low, high = np.quantile(model.draws(index), [0.025, 0.975], axis=0)
            full = self.full(task)
            for i, score in enumerate(model.predict(index)):
                found[i][task] = Predicted(float(score), float(min(low[i], score)), float(max(high[i], score)), full)
        return found


class Program:
    """The mixed-integer program: one binary per choice, products of choices where pairs interact."""

    def __init__(self, knapsack: Knapsack, allowed: Allowed | None = None, tied: Sequence[Sequence[str]] = ()) -> None:
        self.knapsack = knapsack
        self.counts = [len(options) for options in knapsack.space.choices]
        self.first = np.cumsum([0, *self.counts])
        self.low: list[float] = []
        self.high: list[float] = []
        self.whole: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.products: dict[tuple[int, int], int] = {}
        self._new(int(self.first[-1]), 0, 1, whole=True)
        for start, n in zip(self.first, self.counts, strict=False):
            self.rows.append(({start + i: 1.0 for i in range(n)}, 1, 1))
        self._allow(allowed)
        for group in tied:
            self._tie(group)

    def _new(self, count: int, low: float, high: float, whole: bool = False) -> int:
        start = len(self.low)
        self.low += [low] * count
        self.high += [high] * count
        self.whole += [int(whole)] * count
        return start

    def _allow(self, allowed: Allowed | None) -> None:
        space = self.knapsack.space
        for start, name, options in zip(self.first, space.names, space.choices, strict=False):
            fine = [allowed is None or allowed(name, option) for option in options]
            if not any(fine):
                raise UserError(f"no measured width of {name} is allowed; there are {_widths(options)}")
            self.high[start : start + len(options)] = map(float, fine)

    def _tie(self, group: Sequence[str]) -> None:
        space = self.knapsack.space
        for name in group:
            if name not in space.names:
                raise unknown("component", name, space.names)
        places = [space.names.index(name) for name in group]
        shared = set.intersection(*(set(space.choices[c]) for c in places))
        for c in places:
            for i, option in enumerate(space.choices[c]):
                if option not in shared:
                    self.high[self.first[c] + i] = 0
        for c in places[1:]:
            for option in shared:
                one, other = (self.first[p] + space.choices[p].index(option) for p in (places[0], c))
                self.rows.append(({one: 1.0, other: -1.0}, 0, 0))

    def at_most(self, bits: float) -> None:
        """A budget, for what can be chosen at all."""
        weights = np.concatenate(self.knapsack.bits)
        unit = float(weights.max())
        self.rows.append(({i: w / unit for i, w in enumerate(weights)}, -np.inf, bits / unit))

    def keep(self, task: str, share: float) -> None:
        """At least this share of full precision, as predicted."""
        limit = self.knapsack.models[task].eta_at(share * self.knapsack.full(task))
        if limit < 0:
            raise UserError(f"a floor of {share:.0%} on '{task}' is more than full precision reaches")
        if math.isfinite(limit):
            self.rows.append((self.damage(task), -np.inf, limit + 1e-9))

    def damage(self, task: str) -> dict[int, float]:
        """A task's damage as coefficients; products of choices get variables of their own."""
        model = self.knapsack.models[task]
        worst = 16 ** (1 / model.power)  # beyond it nothing is left to lose
        damages = [np.minimum(d, worst) for d in model.damages()]
        out = dict(enumerate(np.concatenate(damages)))
        for gamma, (a, b) in zip(model.gammas(), model.pairs, strict=True):
            start = self._product(a, b)
            out |= {start + i: value for i, value in enumerate((gamma * np.outer(damages[a], damages[b])).ravel())}
        return out

    def _product(self, a: int, b: int) -> int:
        """Variables z[i, j] = x[a, i] * x[b, j], made exact by their row and column sums."""
        if (a, b) not in self.products:
            n, m = self.counts[a], self.counts[b]
            start = self.products[a, b] = self._new(n * m, 0, 1)
            for i in range(n):
                self.rows.append(({**{start + i * m + j: 1.0 for j in range(m)}, self.first[a] + i: -1.0}, 0, 0))
            for j in range(m):
                self.rows.append(({**{start + i * m + j: 1.0 for i in range(n)}, self.first[b] + j: -1.0}, 0, 0))
        return self.products[a, b]

    def bound(self, weights: Mapping[str, float]) -> dict[int, float]:
        """Minus an upper bound of the weighted mean of tasks, each as a share of full precision.

        A task's score is a curve over its damage; over each of a few stretches a line above the curve stands for it.
        """
        cost: dict[int, float] = {}
        for task, weight in weights.items():
            model, full = self.knapsack.models[task], self.knapsack.full(task)
            damage = self.damage(task)
            knots, slopes, starts = _above(model)
            pieces = self._new(len(slopes), 0, 1, whole=True)
            inside = self._new(len(slopes), -np.inf, np.inf)
            self.rows.append(({pieces + k: 1.0 for k in range(len(slopes))}, 1, 1))
            self.rows.append((damage | {inside + k: -1.0 for k in range(len(slopes))}, 0, 0))
            for k in range(len(slopes)):
                self.rows.append(({inside + k: 1.0, pieces + k: -knots[k]}, 0, np.inf))
                self.rows.append(({inside + k: 1.0, pieces + k: -knots[k + 1]}, -np.inf, 0))
            cost |= {inside + k: -weight / full * slope for k, slope in enumerate(slopes)}
            cost |= {pieces + k: -weight / full * start for k, start in enumerate(starts)}
        return cost

    def exclude(self, row: Floats) -> None:
        self.rows.append(({self.first[c] + int(i): 1.0 for c, i in enumerate(row)}, -np.inf, len(row) - 1))

    def minimize(self, cost: Mapping[int, float]) -> tuple[Floats, float] | None:
        """The choice per component with the least cost, and that cost; None when nothing fits."""
        entries = [(r, c, v) for r, (row, _, _) in enumerate(self.rows) for c, v in row.items()]
        r, c, v = zip(*entries, strict=True)
        matrix = csr_array((v, (r, c)), shape=(len(self.rows), len(self.low)))
        limits = LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])
        objective = np.zeros(len(self.low))
        objective[list(cost)] = list(cost.values())
        scale = max(float(np.abs(objective).max()), 1e-12)
        with silenced():  # HiGHS prints of a second solve of its own with a bare printf, whatever its options say
            found = milp(
                objective / scale,
                constraints=limits,
                integrality=np.array(self.whole),
                bounds=Bounds(np.array(self.low), np.array(self.high)),
                options={"mip_rel_gap": 0},
            )
        if found.x is None:
            return None
        picked = [found.x[start:end] for start, end in itertools.pairwise(self.first)]
        return np.array([int(np.argmax(p)) for p in picked]), float(found.fun) * scale


def _nothing_to_lose(task: str, full: float) -> str:
    if full == 0:
        return (
            f"full precision scored 0 on '{task}', so there is nothing to lose and no plan to prefer; have a look at "
            "the task, its prompts and answers: does the model ever answer it?"
        )
    return f"full precision scored {full:g} on '{task}'; plans are compared by their share of it, which must be above 0"


def _above(model: Surrogate) -> tuple[Floats, Floats, Floats]:
    """Knots, slopes and intercepts of lines that lie above the curve of score over damage."""
    worst = 16 ** (1 / model.power)
    levels = np.linspace(1, 0, SEGMENTS + 1)[1:-1]
    knots = np.concatenate([[0.0], (-np.log(levels)) ** (1 / model.power), [worst]])
    knots = np.unique(knots)
    slopes, starts = [0.0], [float(model.at_damage(np.zeros(1))[0])]  # products may push the damage below none
    for left, right in itertools.pairwise(knots):
        along = np.linspace(left, right, 50)
        curve = model.at_damage(along)
        slope = (curve[-1] - curve[0]) / (right - left)
        slopes.append(float(slope))
        starts.append(float((curve - slope * along).max() + 1e-4 * abs(curve[0] - curve[-1])))
    slopes.append(0.0)
    starts.append(float(model.at_damage(np.array([worst]))[0]))
    return np.concatenate([[-1e3], knots, [1e4]]), np.array(slopes), np.array(starts)


def _widths(options: Sequence[Choice]) -> str:
    return ", ".join("native" if option is None else str(option) for option in options)
