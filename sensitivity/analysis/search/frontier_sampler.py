"""Our Optuna sampler: asks for the plan that is expected to raise the frontier of score against size the most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState

from sensitivity.analysis.surrogate.surrogate import Space, Surrogate, learn

Floats = np.ndarray
ALL = 20_000  # spaces up to this size are looked at in full
DRAWS = 48  # plausible surrogates that vote
LITTLE = 0.001  # of the full score, over sizes e-fold apart: a gain that is not worth a measurement


@dataclass(frozen=True)
class PlanSizes:
    """Bits of each choice of each component, and of what never changes: enough to weigh any plan."""

    bits: tuple[Floats, ...]
    kept: float
    numel: float

    def bpw(self, index: Floats) -> Floats:
        total = sum(bits[index[:, c]] for c, bits in enumerate(self.bits))
        return np.asarray((total + self.kept) / self.numel)


class FrontierSampler(BaseSampler):
    """Parameters are positions in a space's choices, one per component; the last objective is the size.

    Noise: neither the incumbents nor the gains are read off measurements. Both are values of the surrogate, which
    has seen all readings, so that one lucky reading moves little. A plan's gain is summed over budgets: by turns
    as the surrogate has it, which measures what it would recommend, and averaged over plausible surrogates, which is
    high where a plan is uncertain too.
    """

    def __init__(
        self,
        space: Space,
        weights: PlanSizes,
        candidates: Floats | None = None,
        low: Sequence[int] | None = None,
        seed: int = 0,
        noise: float | None = None,
    ) -> None:
        self.space, self.weights, self.noise = space, weights, noise
        self.low = tuple(low) if low is not None else (0,) * len(space.names)  # 1: may not stay native
        self.draw = np.random.default_rng(seed)
        self._other = RandomSampler(seed=seed)
        self.candidates = candidates
        sizes = [len(options) for options in space.choices]
        if candidates is None and math.prod(sizes) <= ALL:
            ranges = [np.arange(first, n) for first, n in zip(self.low, sizes, strict=True)]
            self.candidates = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(sizes))

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters at once."""
        return {
            name: IntDistribution(first, len(options) - 1)
            for name, first, options in zip(self.space.names, self.low, self.space.choices, strict=True)
        }

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.values]
        index = np.array([[t.params[name] for name in self.space.names] for t in done], dtype=int)
        scores = np.array([t.values[:-1] for t in done], dtype=float)
        row = self.next(index.reshape(-1, len(self.space.names)), scores.reshape(len(done), len(study.directions) - 1))
        return {name: int(i) for name, i in zip(self.space.names, row, strict=True)}

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._other.sample_independent(study, trial, param_name, param_distribution)

    def next(self, index: Floats, scores: Floats) -> Floats:
        """The plan to measure next, given plans (rows of choices) and their scores (a column per task)."""
        start = [row for row in self.opening() if not (index == row).all(axis=1).any()]
        if start:
            return start[0]
        task = int(self.draw.integers(scores.shape[1]))  # several tasks take turns by lot
        native = (index == 0).all(axis=1)
        full = float(scores[native, task].mean()) if native.any() else None
        model = learn(self.space, index, scores[:, task], full, self.noise)
        pool = self.pool(model, index)
        pool = pool[~_known(pool, index)]
        if not len(pool):
            return self._random()
        gain = self.gain(model, pool, index, model.theta[None])  # if the surrogate is right
        if len(index) % 2 or gain.max() < LITTLE * abs(float(model.theta[0])):
            gain = self.gain(model, pool, index, model.sample(self.draw, DRAWS))
        return np.asarray(pool[int(np.argmax(gain))])

    def opening(self) -> list[Floats]:
        """Full precision and the uniform plans: they tell where the cliff is."""
        rows = [] if any(self.low) else [np.zeros(len(self.space.names), dtype=int)]
        shared = set.intersection(*(set(options) for options in self.space.choices)) - {None}
        for scheme in sorted(shared, key=lambda s: -s.bits if s else 0):
            rows.append(np.array([options.index(scheme) for options in self.space.choices]))
        if self.candidates is None:
            return rows or [self._random()]
        return [row for row in rows if (self.candidates == row).all(axis=1).any()] or [self.candidates[0]]

    def pool(self, model: Surrogate, index: Floats) -> Floats:
        """Plans to look at: all, or where those are too many, the best under plausible surrogates and neighbors."""
        if self.candidates is not None:
            return self.candidates
        rows = [*index]
        for theta in model.sample(self.draw, DRAWS):
            damages = model.damages(theta)
            unit = sum(d.max() for d in damages) / sum(bits.max() for bits in self.weights.bits)
            for price in np.geomspace(1e-4, 10, 24) * unit:  # what a bit costs: each price gives a plan on the hull
                rows.append(
                    np.array(
                        [
                            first + int(np.argmin((damage + price * bits)[first:]))
                            for first, damage, bits in zip(self.low, damages, self.weights.bits, strict=True)
                        ]
                    )
                )
        found = np.unique(np.array(rows), axis=0)
        sizes = np.array([len(options) for options in self.space.choices])
        moved = found[self.draw.integers(len(found), size=2000)].copy()
        which = self.draw.integers(len(sizes), size=len(moved))
        moved[np.arange(len(moved)), which] = self.draw.integers(np.array(self.low)[which], sizes[which])
        found = np.unique(np.concatenate([found, moved]), axis=0)
        return found[(found >= np.array(self.low)).all(axis=1)]

    def gain(self, model: Surrogate, pool: Floats, index: Floats, thetas: Floats) -> Floats:
        """Mean rise, over surrogates, of the frontier of measured plans if a plan joined it, integrated over log size.

        The frontier is a staircase: each of its plans holds the sizes up to the next one's.
        """
        steps = self.staircase(model, index)
        rows = np.concatenate([pool, *(row[None] for _, row in steps)])
        drawn = np.stack([model.predict(rows, theta) for theta in thetas])
        drawn, held = drawn[:, : len(pool)], drawn[:, len(pool) :]
        nothing = np.minimum(0.0, drawn.min(axis=1, keepdims=True))
        size, last = np.log(self.weights.bpw(pool)), self.largest(index)
        begin = [min(float(size.min()), last), *(at for at, _ in steps)]
        total = np.zeros(len(pool))
        for start, end, value in zip(begin, [*begin[1:], last], np.hstack([nothing, held]).T, strict=True):
            width = np.clip(end - np.maximum(size, start), 0, None)
            total += np.maximum(drawn - value[:, None], 0).mean(axis=0) * width
        return total

    def staircase(self, model: Surrogate, index: Floats) -> list[tuple[float, Floats]]:
        """Measured plans that the surrogate holds for the best of their size, with the logarithm of that size."""
        size, mean = np.log(self.weights.bpw(index)), model.predict(index)
        steps: list[tuple[float, Floats]] = []
        best = -math.inf
        for i in np.lexsort((-mean, size)):
            if mean[i] > best:
                best = float(mean[i])
                steps.append((float(size[i]), index[i]))
        return steps

    def largest(self, index: Floats) -> float:
        """Where the frontier ends to matter: at the widest uniform plan that is not full precision."""
        opening = np.array([row for row in self.opening() if row.any()])
        rows = opening if len(opening) else index
        return float(np.log(self.weights.bpw(rows)).max()) + 0.02

    def _random(self) -> Floats:
        return np.array(
            [
                int(self.draw.integers(first, len(options)))
                for first, options in zip(self.low, self.space.choices, strict=True)
            ]
        )


def _known(pool: Floats, index: Floats) -> Floats:
    seen = {row.tobytes() for row in np.ascontiguousarray(index, dtype=np.int64)}
    return np.array([row.tobytes() in seen for row in np.ascontiguousarray(pool, dtype=np.int64)], dtype=bool)


def believed(model: Surrogate, index: Floats, scores: Sequence[float] | Floats, noise: float | None) -> Floats:
    """What measured plans are believed to score: the surrogate, corrected by their own reading as far as it is
    more than noise. Where the noise is unknown all that the surrogate misses is taken for noise."""
    spread = model.sigma**2
    own = 0.0 if noise is None or spread == 0 else max(0.0, 1 - noise**2 / spread)
    expected = model.predict(index)
    return np.asarray(expected + own * (np.asarray(scores, dtype=float) - expected))
