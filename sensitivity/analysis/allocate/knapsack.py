"""Knapsack: what a budget can be spent on, with the size and the predicted score of each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sensitivity.analysis.allocate.run_time_limits import RunTimeLimits
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Space
from sensitivity.analysis.surrogate.surrogate import Surrogate
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import Size, choice_bits, kept_bits, size
from sensitivity.study.storage.expected import read as read_expected
from sensitivity.study.study import Study

Floats = np.ndarray


@dataclass(frozen=True)
class Predicted:
    """A plan's predicted score on one task, with a 95 % interval of the expected score, not of one measurement."""

    score: float
    low: float
    high: float
    full: float  # predicted for full precision
    bounded: bool = False  # whether all scores that were measured lie from 0 to 1

    @property
    def possible(self) -> Predicted:
        """The prediction as it is shown: no further than 0 and 1 where all measured scores lie between them."""
        if not self.bounded:
            return self
        score, low, high = (min(max(value, 0.0), 1.0) for value in (self.score, self.low, self.high))
        return Predicted(score, low, high, min(self.full, 1.0), bounded=True)

    def to_json(self) -> dict[str, float]:
        """The prediction as it is shown, as JSON values."""
        shown = self.possible
        return {"score": shown.score, "low": shown.low, "high": shown.high, "full": shown.full}


def mean_of(predictions: Sequence[Predicted]) -> Predicted:
    """The mean of several predictions of one score, with an interval that holds theirs."""
    score, full = (float(np.mean([getattr(one, name) for one in predictions])) for name in ("score", "full"))
    low, high = min(one.low for one in predictions), max(one.high for one in predictions)
    return Predicted(score, low, high, full, all(one.bounded for one in predictions))


@dataclass(frozen=True)
class Knapsack:
    """What a budget can be spent on: choices, their bits (as a format stores them), and a surrogate for each task."""

    parts: ComponentMap
    space: Space
    bits: tuple[Floats, ...]  # per component, per choice
    models: dict[str, Surrogate]
    kept: int  # bits that no choice changes
    format: str | None = None
    limits: RunTimeLimits | None = None  # what a plan may take while it runs
    bounded: frozenset[str] = frozenset()  # tasks whose scores all lie from 0 to 1

    @classmethod
    def of(
        cls,
        study: Study,
        tasks: Sequence[str],
        format: str | None = None,
        limits: RunTimeLimits | None = None,
        expecting: bool = True,
    ) -> Knapsack:
        """The knapsack of a study: every scheme that it measured or has an expectation of, and fitted surrogates.

        expecting: whether surrogates start from the expected damages; if not, they know what was measured alone.
        """
        expected = read_expected(study.path)
        if not study.measured():
            raise UserError(
                f"{study.path} has no measured plan yet, from which one for a budget could be chosen: run the command "
                "that made it again, which goes on where it stopped"
            )
        space = Space.of([trial.plan for trial in study.measured()], expected)
        models, bounded = {}, set()
        for task in tasks:
            observations = observations_of(study, task)
            if not observations.full > 0:
                raise UserError(_nothing_to_lose(task, observations.full))
            if observations.score.min() >= 0 and observations.score.max() <= 1:
                bounded.add(task)
            models[task] = fit_surrogate(
                space,
                space.encode(observations.plans),
                observations.steadied,
                replace(observations, score=observations.steadied).full,
                observations.noises,
                expected=expected if expecting else None,
            )
        return replace(cls.build(study.parts, space, models, format), limits=limits, bounded=frozenset(bounded))

    @classmethod
    def build(
        cls, parts: ComponentMap, space: Space, models: Mapping[str, Surrogate], format: str | None = None
    ) -> Knapsack:
        """The knapsack of a space and of surrogates that were fitted already."""
        bits = choice_bits(parts, [(name,) for name in space.names], space.choices, format)
        return cls(
            parts, space, tuple(np.array(b, dtype=float) for b in bits), dict(models), kept_bits(parts, format), format
        )

    def size(self, plan: Plan) -> Size:
        """The size of a plan, as the format stores it."""
        return size(self.parts, plan, self.format)

    def full(self, task: str) -> float:
        """Predicted score of full precision, so that a share of it compares two predictions."""
        return float(self.models[task].predict(np.zeros((1, len(self.space.names)), dtype=int))[0])

    def predicted(self, plans: Sequence[Plan]) -> list[dict[str, Predicted]]:
        """For each plan, the prediction for each task."""
        if not plans:
            return []
        index = self.space.encode(plans)
        predictions: list[dict[str, Predicted]] = [{} for _ in plans]
        for task, model in self.models.items():
            low, high = np.quantile(model.draws(index), [0.025, 0.975], axis=0)
            full = self.full(task)
            for i, score in enumerate(model.predict(index)):  # an interval is widened to hold its prediction
                ends = float(min(low[i], score)), float(max(high[i], score))
                predictions[i][task] = Predicted(float(score), *ends, full, task in self.bounded)
        return predictions


def _nothing_to_lose(task: str, full: float) -> str:
    """Why plans cannot be compared by their share of this score of full precision."""
    if full == 0:
        return (
            f"full precision scored 0 on '{task}', so there is nothing to lose and no plan to prefer; have a look at "
            "the task, its prompts and answers: does the model ever answer it?"
        )
    return f"full precision scored {full:g} on '{task}'; plans are compared by their share of it, which must be above 0"
