"""The knapsack as a mixed-integer program with interacting pairs, solved exactly by SciPy's HiGHS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.surrogate.space import Choice
from sensitivity.analysis.surrogate.surrogate import Surrogate
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.limits import Allowed
from sensitivity.spec.standard_output import silenced

Floats = np.ndarray
# line segments that bound a task's score from above, where several tasks are weighted, and as many more for scores near
# those of a plan that was found, in shares of the score
SEGMENTS, NEAR = 24, 0.04
GAP = 1e-5  # HiGHS stops at a plan within this share of the bound, where the objective is only a bound anyway


class Program:
    """The mixed-integer program: a binary variable per choice, and products of choices for interacting pairs.

    `low` and `high` are the bounds of each variable, and `integral` is 1 for integers. `rows` are the constraints: the
    coefficients of variables, and the least and the most that their sum may be.
    """

    def __init__(self, knapsack: Knapsack, allowed: Allowed | None = None, tied: Sequence[Sequence[str]] = ()) -> None:
        self.knapsack = knapsack
        self.counts = [len(options) for options in knapsack.space.choices]
        self.first = np.cumsum([0, *self.counts])
        self.low: list[float] = []
        self.high: list[float] = []
        self.integral: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.products: dict[tuple[int, int], int] = {}
        self._new(int(self.first[-1]), 0, 1, integral=True)
        for start, n in zip(self.first, self.counts, strict=False):  # exactly one choice per component
            self.rows.append(({start + i: 1.0 for i in range(n)}, 1, 1))
        self._allow(allowed)
        for group in tied:
            self._tie(group)

    def copy(self) -> Program:
        """A program to which more can be added while this one stays as it is."""
        copied = copy(self)
        copied.low, copied.high, copied.integral = [*self.low], [*self.high], [*self.integral]
        copied.rows, copied.products = [*self.rows], dict(self.products)
        return copied

    def _new(self, count: int, low: float, high: float, integral: bool = False) -> int:
        """Add variables with these bounds; return the index of the first."""
        start = len(self.low)
        self.low += [low] * count
        self.high += [high] * count
        self.integral += [int(integral)] * count
        return start

    def _allow(self, allowed: Allowed | None) -> None:
        """Fix the choices that are not allowed at 0."""
        space = self.knapsack.space
        for start, name, options in zip(self.first, space.names, space.choices, strict=False):
            permitted = [allowed is None or allowed(name, option) for option in options]
            if not any(permitted):
                raise UserError(f"no measured width of {name} is allowed; there are {_widths(options)}")
            self.high[start : start + len(options)] = map(float, permitted)

    def _tie(self, group: Sequence[str]) -> None:
        """Make the components of a group choose the same scheme."""
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
        """Limit the bits of all chosen schemes together; kept weights are not among them."""
        weights = np.concatenate(self.knapsack.bits)
        unit = float(weights.max())  # HiGHS's tolerances are absolute: coefficients are scaled to about 1
        self.rows.append(({i: w / unit for i, w in enumerate(weights)}, -np.inf, bits / unit))

    def limit(self, costs: Floats, most: float) -> None:
        """Limit the sum of what all chosen schemes cost: milliseconds, or memory; NaN forbids a choice."""
        for i in np.flatnonzero(np.isnan(costs)):
            self.high[i] = 0
        unit = max(float(np.nanmax(np.abs(costs))), 1e-300)
        self.rows.append(({i: c / unit for i, c in enumerate(np.nan_to_num(costs))}, -np.inf, most / unit))

    def limit_run_time(self) -> None:
        """Add the knapsack's limits on what a plan takes while it runs."""
        if self.knapsack.limits is not None:
            for costs, most in self.knapsack.limits.rows(self.knapsack.parts, self.knapsack.space).values():
                self.limit(costs, most)

    def keep(self, task: str, share: float) -> None:
        """Demand at least this share of full precision's predicted score, by a limit on the total damage."""
        limit = self.knapsack.models[task].eta_at(share * self.knapsack.full(task))
        if limit < 0:
            raise UserError(f"a floor of {100 * share:.4g} % on '{task}' is more than full precision reaches")
        if math.isfinite(limit):  # else even the worst plan keeps that share
            self.rows.append((self.damage(task), -np.inf, limit + 1e-9))  # rounding must not forbid a floor of 100 %

    def damage(self, task: str) -> dict[int, float]:
        """Coefficients of a task's total damage, which is linear in the choices and in the products of choices."""
        model = self.knapsack.models[task]
        # damage that leaves exp(-16) of the score: more changes nothing, and huge coefficients ruin the precision
        worst = 16 ** (1 / model.power)
        damages = [np.minimum(d, worst) for d in model.damages()]
        out = dict(enumerate(np.concatenate(damages)))
        for gamma, (a, b) in zip(model.gammas(), model.pairs, strict=True):
            start = self._product(a, b)
            out |= {start + i: value for i, value in enumerate((gamma * np.outer(damages[a], damages[b])).ravel())}
        return out

    def _product(self, a: int, b: int) -> int:
        """Variables z[i, j] = x[a, i] * x[b, j], made exact by their row and column sums.

        Rows sum to x[a, i] and columns to x[b, j]. Since x is binary with a single 1 per component, z is 1 where both
        choices meet and 0 elsewhere, without being integer itself.
        """
        if (a, b) not in self.products:
            n, m = self.counts[a], self.counts[b]
            start = self.products[a, b] = self._new(n * m, 0, 1)
            for i in range(n):
                self.rows.append(({**{start + i * m + j: 1.0 for j in range(m)}, self.first[a] + i: -1.0}, 0, 0))
            for j in range(m):
                self.rows.append(({**{start + i * m + j: 1.0 for i in range(n)}, self.first[b] + j: -1.0}, 0, 0))
        return self.products[a, b]

    def bound(self, weights: Mapping[str, float], near: Floats | None = None) -> dict[int, float]:
        """The objective for several tasks: minus an upper bound of their weighted mean share of full precision.

        A task's score is a curve over its damage, which a linear program cannot hold. So the damage is cut into
        segments, and in each a line above the curve stands for it: `pieces` is 1 for the segment in which the damage
        lies, where `inside` equals the damage; both are 0 for every other segment.

        near: a plan around whose damages the bound is tight.
        """
        cost: dict[int, float] = {}
        for task, weight in weights.items():
            model, full = self.knapsack.models[task], self.knapsack.full(task)
            damage = self.damage(task)
            knots, slopes, starts = _above(model, near)
            pieces = self._new(len(slopes), 0, 1, integral=True)
            inside = self._new(len(slopes), -np.inf, np.inf)
            self.rows.append(({pieces + k: 1.0 for k in range(len(slopes))}, 1, 1))
            self.rows.append((damage | {inside + k: -1.0 for k in range(len(slopes))}, 0, 0))
            for k in range(len(slopes)):
                self.rows.append(({inside + k: 1.0, pieces + k: -knots[k]}, 0, np.inf))
                self.rows.append(({inside + k: 1.0, pieces + k: -knots[k + 1]}, -np.inf, 0))
            cost |= {inside + k: -weight / full * slope for k, slope in enumerate(slopes)}
            cost |= {pieces + k: -weight / full * start for k, start in enumerate(starts)}
        return cost

    def allows(self, rows: Floats) -> Floats:
        """Which plans meet the limits on single components and all constraints on choices alone, without products."""
        chosen = self.first[:-1] + rows
        meets = np.all(np.array(self.high)[chosen] > 0, axis=1)
        for coefficients, low, high in self.rows:
            if max(coefficients) < self.first[-1]:
                weights = np.zeros(int(self.first[-1]))
                weights[list(coefficients)] = list(coefficients.values())
                total = weights[chosen].sum(axis=1)
                # with room for rounding; the caller counts the budget in bits
                meets &= (low - 1e-9 <= total) & (total <= high + 1e-9)
        return np.asarray(meets)

    def exclude(self, row: Floats) -> None:
        """Forbid one plan, so that the next solution is the next best."""
        self.rows.append(({self.first[c] + int(i): 1.0 for c, i in enumerate(row)}, -np.inf, len(row) - 1))

    def minimize(self, cost: Mapping[int, float], gap: float = 0.0) -> tuple[Floats, float] | None:
        """The choice of each component with the least cost, and that cost; None where no plan meets the constraints.

        With a gap, the plan may cost more than the least by that share, and the cost is a bound that none is below.
        """
        entries = [(r, c, v) for r, (row, _, _) in enumerate(self.rows) for c, v in row.items()]
        r, c, v = zip(*entries, strict=True)
        matrix = csr_array((v, (r, c)), shape=(len(self.rows), len(self.low)))
        limits = LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])
        objective = np.zeros(len(self.low))
        objective[list(cost)] = list(cost.values())
        scale = max(float(np.abs(objective).max()), 1e-12)
        with silenced():  # HiGHS reports a second, internal solve with a bare printf, whatever its options say
            solution = milp(
                objective / scale,
                constraints=limits,
                integrality=np.array(self.integral),
                bounds=Bounds(np.array(self.low), np.array(self.high)),
                options={"mip_rel_gap": gap},  # by default HiGHS stops at a plan within 1e-4 of the best
            )
        if solution.x is None:
            return None
        chosen = [solution.x[start:end] for start, end in itertools.pairwise(self.first)]
        least = solution.mip_dual_bound if gap else solution.fun
        return np.array([int(np.argmax(one)) for one in chosen]), float(least) * scale


def _above(model: Surrogate, near: Floats | None = None) -> tuple[Floats, Floats, Floats]:
    """Segments of damage, and for each the slope and intercept of a line that lies above the curve of the score.

    near: a plan around whose damage the segments are short.
    """
    worst = 16 ** (1 / model.power)
    # knots at equal steps of the score, so that no segment's line is far above the curve
    levels = np.linspace(1, 0, SEGMENTS + 1)[1:-1]
    if near is not None:
        level = math.exp(-(min(model.total_damage(near), worst) ** model.power))  # from 1 at full precision to 0
        close = np.linspace(level - NEAR, level + NEAR, SEGMENTS + 1)
        levels = np.concatenate([levels, close[(close > math.exp(-16)) & (close < 1)]])
    knots = np.concatenate([[0.0], (-np.log(levels)) ** (1 / model.power), [worst]])
    knots = np.unique(knots)
    slopes, starts = [0.0], [float(model.at_damage(np.zeros(1))[0])]  # damage below 0: the score stays
    for left, right in itertools.pairwise(knots):
        along = np.linspace(left, right, 50)
        curve = model.at_damage(along)
        # the chord, lifted until it lies above all sampled points, and a little for what lies between them
        slope = (curve[-1] - curve[0]) / (right - left)
        slopes.append(float(slope))
        starts.append(float((curve - slope * along).max() + 1e-4 * abs(curve[0] - curve[-1])))
    slopes.append(0.0)
    starts.append(float(model.at_damage(np.array([worst]))[0]))
    return np.concatenate([[-1e3], knots, [1e4]]), np.array(slopes), np.array(starts)


def _widths(options: Sequence[Choice]) -> str:
    return ", ".join("native" if option is None else str(option) for option in options)
