"""An Optuna sampler that proposes the plan expected to raise the frontier of score against size the most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState

from sensitivity.analysis.surrogate.space import Expected, Space
from sensitivity.study.racing import frontier

if TYPE_CHECKING:
    from sensitivity.analysis.surrogate.surrogate import Surrogate

Floats = np.ndarray
MAX_COMPARED = 20_000  # of a space with at most so many plans, all are compared
DRAWS = 48  # scores drawn from the surrogate, over which a gain is averaged
MEASURED_ALONE = 2  # every second plan is proposed without what is expected, which may be wrong
MIN_GAIN = 0.001  # a smaller predicted gain counts as none; as a share of full precision's score, times log size


@dataclass(frozen=True)
class PlanSizes:
    """Stored bits of each choice of each component, and of everything kept: enough for the bpw of any plan."""

    bits: tuple[Floats, ...]
    kept: float  # bits that no choice changes
    numel: float  # weights of the model

    def bpw(self, index: Floats) -> Floats:
        """Bits per weight of plans, given as rows of positions."""
        total = sum(bits[index[:, c]] for c, bits in enumerate(self.bits))
        return np.asarray((total + self.kept) / self.numel)


class FrontierSampler(BaseSampler):
    """Proposes plans: an integer parameter per component, its position among the choices; the last objective is bpw.

    Scores are noisy, so neither the frontier nor a plan's gain is read off single measurements: both are predictions of
    the surrogate, which is fitted to all trials, so that one lucky score changes little. A plan's gain is the area that
    it adds under the frontier of score over log size. One proposal computes it from predicted scores, which favors what
    would be recommended (exploitation); the next as the mean over scores drawn from the surrogate's uncertainty, which
    also favors plans whose score is uncertain (exploration).
    """

    def __init__(
        self,
        space: Space,
        sizes: PlanSizes,
        candidates: Floats | None = None,
        low: Sequence[int] | None = None,
        seed: int = 0,
        noise: float | None = None,
        expected: Expected | None = None,
    ) -> None:
        self.space, self.sizes, self.noise, self.expected = space, sizes, noise, expected
        self.low = tuple(low) if low is not None else (0,) * len(space.names)  # first position allowed
        self.draw = np.random.default_rng(seed)
        self._random_sampler = RandomSampler(seed=seed)
        self.candidates = candidates
        counts = [len(options) for options in space.choices]
        if candidates is None and math.prod(counts) <= MAX_COMPARED:
            ranges = [np.arange(first, n) for first, n in zip(self.low, counts, strict=True)]
            self.candidates = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(counts))

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters, so that `sample_relative` chooses a plan as a whole."""
        return {
            name: IntDistribution(first, len(options) - 1)
            for name, first, options in zip(self.space.names, self.low, self.space.choices, strict=True)
        }

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, int]:
        """The next plan, given the completed trials."""
        done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.values]
        index = np.array([[t.params[name] for name in self.space.names] for t in done], dtype=int)
        scores = np.array([t.values[:-1] for t in done], dtype=float)  # the last value, the size, is known of any plan
        row = self.next(index.reshape(-1, len(self.space.names)), scores.reshape(len(done), len(study.directions) - 1))
        return {name: int(i) for name, i in zip(self.space.names, row, strict=True)}

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        """A random value, for a parameter that is not among the components."""
        return self._random_sampler.sample_independent(study, trial, param_name, param_distribution)

    def next(self, index: Floats, scores: Floats) -> Floats:
        """The plan to measure next, given measured plans (rows of positions) and their scores (a column per task)."""
        from sensitivity.analysis.surrogate.fitting import (
            fit_surrogate,  # imports scipy's solvers, which takes a second
        )

        opening = [row for row in self.opening() if not (index == row).all(axis=1).any()]
        if opening:
            return opening[0]
        task = int(self.draw.integers(scores.shape[1]))  # with several tasks, each plan is chosen for one of them
        native = (index == 0).all(axis=1)
        full = float(scores[native, task].mean()) if native.any() else None
        expected = self.expected if len(index) % MEASURED_ALONE else None
        model = fit_surrogate(self.space, index, scores[:, task], full, self.noise, expected=expected)
        pool = self.pool(model, index)
        pool = pool[~_already_measured(pool, index)]
        if not len(pool):
            return self._random()
        gain = self.gain(model, pool, index)
        # every other time, and when no plan is predicted to gain, gains are averaged over drawn scores (exploration)
        if len(index) % 2 or gain.max() < MIN_GAIN * abs(float(model.theta[0])):
            gain = self.gain(model, pool, index, DRAWS)
        return np.asarray(pool[int(np.argmax(gain))])

    def opening(self) -> list[Floats]:
        """The first plans: full precision and the uniform ones, which show at which width the score collapses.

        Where damages are expected, every other uniform plan of the narrower half is enough to show how large they are.
        """
        rows = [] if any(self.low) else [np.zeros(len(self.space.names), dtype=int)]
        uniform = [np.array(row) for row in self.space.uniform()]
        rows += uniform if self.expected is None else uniform[len(uniform) // 2 :: 2]
        return self._proposable(rows) or [self._random() if self.candidates is None else self.candidates[0]]

    def _proposable(self, rows: list[Floats]) -> list[Floats]:
        """The rows that may be proposed: where candidates were given, nothing else."""
        return [row for row in rows if self.candidates is None or (self.candidates == row).all(axis=1).any()]

    def pool(self, model: Surrogate, index: Floats) -> Floats:
        """Plans to choose among: all, or if they are too many, the best under drawn surrogates and their neighbors."""
        if self.candidates is not None:
            return self.candidates
        rows = [*index]
        for theta in model.sample(self.draw, DRAWS):
            damages = model.damages(theta)
            # Lagrangian relaxation: least damage + price * bits is a separate minimum per component, so each price
            # gives a plan on the convex hull at once. Interactions are left out here; `gain` counts them.
            unit = sum(d.max() for d in damages) / sum(bits.max() for bits in self.sizes.bits)
            for price in np.geomspace(1e-4, 10, 24) * unit:  # of a bit, in units of damage
                rows.append(
                    np.array(
                        [
                            first + int(np.argmin((damage + price * bits)[first:]))
                            for first, damage, bits in zip(self.low, damages, self.sizes.bits, strict=True)
                        ]
                    )
                )
        plans = np.unique(np.array(rows), axis=0)
        counts = np.array([len(options) for options in self.space.choices])
        # neighbors with one component changed, for the sizes between two plans of the hull
        neighbors = plans[self.draw.integers(len(plans), size=2000)].copy()
        which = self.draw.integers(len(counts), size=len(neighbors))
        neighbors[np.arange(len(neighbors)), which] = self.draw.integers(np.array(self.low)[which], counts[which])
        plans = np.unique(np.concatenate([plans, neighbors]), axis=0)
        return plans[(plans >= np.array(self.low)).all(axis=1)]

    def gain(self, model: Surrogate, pool: Floats, index: Floats, draws: int = 0) -> Floats:
        """The area that each plan of the pool would add under the frontier of measured plans, predicted or over draws.

        The frontier is a step function of log size: each of its plans is the best one up to the size of the next.
        """
        steps = self.predicted_frontier(model, index)
        rows = np.concatenate([pool, *(row[None] for _, row in steps)])
        drawn = model.draws(rows, self.draw, draws, explore=True) if draws else model.predict(rows)[None]
        drawn, at_steps = drawn[:, : len(pool)], drawn[:, len(pool) :]
        # below the smallest measured plan, the score to beat is 0, or less where scores can be negative
        below = np.minimum(0.0, drawn.min(axis=1, keepdims=True))
        size, last = np.log(self.sizes.bpw(pool)), self.largest_log_size(index)
        begin = [min(float(size.min()), last), *(at for at, _ in steps)]
        total = np.zeros(len(pool))
        for start, end, value in zip(begin, [*begin[1:], last], np.hstack([below, at_steps]).T, strict=True):
            # a plan adds, on the part of this step that is at least its size, what it scores above the step
            width = np.clip(end - np.maximum(size, start), 0, None)
            total += np.maximum(drawn - value[:, None], 0).mean(axis=0) * width
        return total

    def predicted_frontier(self, model: Surrogate, index: Floats) -> list[tuple[float, Floats]]:
        """The frontier of the measured plans by predicted score, smallest first, each with its log size."""
        size, mean = np.log(self.sizes.bpw(index)), model.predict(index)
        return [(float(size[i]), index[i]) for i in frontier(size, mean)]

    def largest_log_size(self, index: Floats) -> float:
        """The log size up to which the frontier counts: that of the largest uniform plan below full precision."""
        opening = np.array(self._proposable([np.array(row) for row in self.space.uniform()]))
        rows = opening if len(opening) else index
        return float(np.log(self.sizes.bpw(rows)).max()) + 0.02  # else a plan of that very size would gain nothing

    def _random(self) -> Floats:
        """A plan whose choices are drawn evenly."""
        return np.array(
            [
                int(self.draw.integers(first, len(options)))
                for first, options in zip(self.low, self.space.choices, strict=True)
            ]
        )


def _already_measured(pool: Floats, index: Floats) -> Floats:
    """Which plans of the pool were measured already."""
    seen = {row.tobytes() for row in np.ascontiguousarray(index, dtype=np.int64)}
    return np.array([row.tobytes() in seen for row in np.ascontiguousarray(pool, dtype=np.int64)], dtype=bool)
