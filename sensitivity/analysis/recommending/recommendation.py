"""Recommendation: the plan to use with its scores, its rivals, whether it is of use, where it came from; as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from sensitivity.analysis.allocate.budget import Candidate, as_measured
from sensitivity.analysis.allocate.knapsack import Predicted
from sensitivity.analysis.recommending.comparison import Comparison, ComparisonJson
from sensitivity.analysis.recommending.request import RequestJson
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import finite
from sensitivity.spec.plan import Plan, SchemeJson
from sensitivity.spec.sizes import Size, SizeJson, size
from sensitivity.study.identity import Meta
from sensitivity.study.scores import LEAST_CLUSTERS, Score, ScoreJson
from sensitivity.study.storage.expected import origin_of
from sensitivity.study.study import Study

NEXT_TO_NOTHING = 0.1  # of what full precision has above chance: a plan that keeps less is not to be used


class Provenance(TypedDict, total=False):
    """Where a recommendation came from."""

    study: Meta
    model: str
    by: str
    trials: int
    trial_keys: list[str]
    expected: str  # what the study expected of its components before it measured, if it did
    read: str  # hash of the plans and scores that were read
    asked: RequestJson
    verified: Meta
    versions: dict[str, str]


class RecommendationJson(TypedDict):
    """A recommendation as JSON values."""

    task: str
    task_weights: dict[str, float]
    budget_bpw: float
    plan: dict[str, SchemeJson | None]
    key: str
    describe: str
    size: SizeJson
    stored_size: NotRequired[SizeJson]  # only in a file, where `size` is counted without a format
    predicted: dict[str, dict[str, float]]
    measured: ScoreJson | None
    by_task: dict[str, ScoreJson]
    full_by_task: NotRequired[dict[str, ScoreJson]]  # files of earlier versions lack it
    full_precision: ScoreJson | None
    uniform: ComparisonJson | None
    candidates: list[ComparisonJson]
    fresh_examples: bool
    verdict: str
    provenance: Provenance


@dataclass(frozen=True, repr=False)
class Recommendation:
    """The plan to use for a budget: its predicted and measured score, and the plans that it was preferred to.

    With several weighted tasks, `measured`, `full` and all comparisons are weighted means of shares of full precision.
    """

    weights: Mapping[str, float]  # task -> how much it counts
    budget: float  # in bpw
    plan: Plan
    size: Size
    candidate: Candidate
    measured: Score | None = None
    full: Score | None = None  # full precision on the same examples
    uniform: Comparison | None = None
    others: tuple[Comparison, ...] = ()  # the other candidates
    fresh: bool = False  # whether it was measured on examples that had no part in choosing the plan
    words: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    by_task: Mapping[str, Score] = field(default_factory=dict)  # measured, each on its own scale
    full_by_task: Mapping[str, Score] = field(default_factory=dict)  # full precision, on the same examples

    def __repr__(self) -> str:
        """The plan with its size, its score and the verdict: all fields would fill pages."""
        expected = self.predicted
        score = f"measured {self.measured}" if self.measured else f"predicted {expected.score:.3f}"
        what = f"{self.plan.describe()}, {self.size.bpw:.2f} bpw, {self.task} {score}"
        return f"<Recommendation for {self.budget:.4g} bpw: {what}. {self.words}>"

    @property
    def task(self) -> str:
        """The task, or the weighted tasks, by which the plan was chosen."""
        return judged_by(self.weights)

    @property
    def predicted(self) -> Predicted:
        """The predicted score on the scale of `measured`, as it is shown."""
        return as_measured({task: one.possible for task, one in self.candidate.predicted.items()}, self.weights)

    def score_on(self, task: str) -> tuple[str, float, float, float]:
        """Whether the score on a task is measured or predicted, the score, and its interval."""
        if measured := self.by_task.get(task):
            return "measured", measured.mean, measured.low, measured.high
        expected = self.candidate.predicted[task].possible
        return "predicted", expected.score, expected.low, expected.high

    def full_on(self, task: str) -> float:
        """Full precision's score on a task: measured on the same examples, or else predicted."""
        if task in self.full_by_task:
            return self.full_by_task[task].mean
        # with several weighted tasks, `full` is a share
        return self.full.mean if self.full and len(self.weights) == 1 else self.candidate.predicted[task].possible.full

    def to_json(self) -> RecommendationJson:
        """The recommendation as JSON values."""
        return {
            "task": self.task,
            "task_weights": dict(self.weights),
            "budget_bpw": self.budget,
            "plan": self.plan.to_json(),
            "key": self.plan.key,
            "describe": self.plan.describe(),
            "size": self.size.to_json(),
            "predicted": {task: p.to_json() for task, p in self.candidate.predicted.items()},
            "measured": self.measured.to_json() if self.measured else None,
            "by_task": {task: score.to_json() for task, score in self.by_task.items()},
            "full_by_task": {task: score.to_json() for task, score in self.full_by_task.items()},
            "full_precision": self.full.to_json() if self.full else None,
            "uniform": self.uniform.to_json() if self.uniform else None,
            "candidates": [other.to_json() for other in self.others],
            "fresh_examples": self.fresh,
            "verdict": self.words,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, data: RecommendationJson, parts: ComponentMap) -> Recommendation:
        """The recommendation that `to_json` wrote, from a file that was checked against its schema."""
        plan = Plan.from_json(data["plan"])
        stored_size = size(parts, plan, data["stored_size"].get("format"))
        predicted = {
            task: Predicted(one["score"], one["low"], one["high"], one["full"])
            for task, one in data["predicted"].items()
        }
        measured, full, uniform = data.get("measured"), data.get("full_precision"), data.get("uniform")
        return cls(
            data["task_weights"],
            data["budget_bpw"],
            plan,
            stored_size,
            Candidate(plan, stored_size, data["budget_bpw"], 0, predicted),
            Score.from_json(measured) if measured else None,
            Score.from_json(full) if full else None,
            Comparison.from_json(uniform) if uniform else None,
            tuple(map(Comparison.from_json, data["candidates"])),
            data["fresh_examples"],
            data["verdict"],
            data["provenance"],
            {task: Score.from_json(one) for task, one in data["by_task"].items()},
            {task: Score.from_json(one) for task, one in data.get("full_by_task", {}).items()},
        )

    def dumps(self) -> str:
        """The recommendation as JSON text, with null for what is not finite."""
        return json.dumps(finite(self.to_json()), indent=1)


def what_is_lost(one: Recommendation) -> dict[str, str]:
    """The tasks on which a plan is of no use, each with its score and the reason in words.

    It is of no use where it is not shown to score above chance, or keeps next to nothing of what full precision has
    above it; nor is any plan where full precision itself is at chance. Too few images say nothing.
    """
    levels = chance_levels(one)
    lost = {}
    for task in one.weights:
        kind, score, low, _ = one.score_on(task)
        measured = one.by_task.get(task)
        if measured is not None and measured.clusters < LEAST_CLUSTERS:
            continue
        # a wide interval of a prediction says that nobody looked, not that the plan is of no use
        least = low if kind == "measured" else score
        if why := _reason(score, least, one.full_on(task), levels.get(task) or 0.0):
            lost[task] = f"{'scores' if kind == 'measured' else 'is predicted to score'} {score:.3f} on {task}, {why}"
    return lost


def chance_levels(one: Recommendation) -> Mapping[str, float | None]:
    """What chance would score on each task, of the examples that the plan was run on; None where it is not known."""
    return (one.provenance.get("verified") or one.provenance.get("study") or {}).get("chance") or {}


def _reason(score: float, low: float, full: float, chance: float) -> str:
    """Why a score is of no use; an empty string where it is."""
    level = f"chance ({chance:.3f})"
    if 0 < full <= chance:
        return f"where full precision itself scores {full:.3f}, no better than {level}"
    if score <= chance and chance:
        near = f"no better than {level}"
    elif low <= chance and chance:
        near = f"not shown to be better than {level}"
    elif score - chance < NEXT_TO_NOTHING * (full - chance):
        near = f"hardly above {level}" if chance else "next to nothing"
    else:
        return ""
    return f"{near}, where full precision scores {full:.3f}"


def warning(one: Recommendation) -> str:
    """A sentence that a plan which is of no use is not to be used, and one where chance is unknown; else nothing."""
    lost, levels = what_is_lost(one), chance_levels(one)
    unknown = [task for task in one.weights if task in levels and levels[task] is None]
    return (f" Do not use it: it {' and '.join(lost.values())}." if lost else "") + (
        f" What chance would score on {' and '.join(unknown)} is not known from one example." if unknown else ""
    )


def judged_by(weights: Mapping[str, float]) -> str:
    """The name of a single task, or weighted tasks as in '0.75 vqa + 0.25 ground'."""
    total = sum(weights.values())
    return next(iter(weights)) if len(weights) == 1 else " + ".join(f"{w / total:.2g} {t}" for t, w in weights.items())


def provenance_of(study: Study) -> Provenance:
    """Where a plan came from: the study's metadata, and the trials that were read."""
    trials, origin = study.measurements(), origin_of(study.path)
    return {
        **({} if origin is None else {"expected": origin}),
        "study": study.meta,
        "model": study.parts.model,
        "by": study.parts.by,
        "trials": len(trials),
        "trial_keys": sorted({trial.key for trial in trials}),
        "read": digest(study),
    }


def digest(study: Study) -> str:
    """A hash of the plans and scores of a study, which changes when the study grows."""
    trials = sorted(json.dumps([trial.key, trial.scores], sort_keys=True) for trial in study.measurements())
    return hashlib.sha256("\n".join(trials).encode()).hexdigest()[:16]
