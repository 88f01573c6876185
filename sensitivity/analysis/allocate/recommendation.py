"""Recommendation: the plan to use, and the verdict of paired measurements on whether it beats the best uniform plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import pandas as pd

from sensitivity.analysis.allocate.believed import shrunk_scores, steadied_rows
from sensitivity.analysis.allocate.budget import Candidate, as_measured
from sensitivity.analysis.allocate.comparison import (
    Comparison,
    ComparisonJson,
    compare_with_plan,
    floor_in_words,
    kept_of,
)
from sensitivity.analysis.allocate.knapsack import Predicted
from sensitivity.analysis.allocate.request import RequestJson
from sensitivity.analysis.observations import observations_of
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import finite
from sensitivity.spec.plan import Plan, SchemeJson
from sensitivity.spec.sizes import Size, SizeJson, size
from sensitivity.study.identity import Meta
from sensitivity.study.scores import Score, ScoreJson, summarize
from sensitivity.study.study import Study


class Provenance(TypedDict, total=False):
    """Where a recommendation came from."""

    study: Meta
    model: str
    by: str
    trials: int
    trial_keys: list[str]
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
    full_precision: ScoreJson | None
    uniform: ComparisonJson | None
    candidates: list[ComparisonJson]
    fresh_examples: bool
    verdict: str
    provenance: Provenance


@dataclass(frozen=True)
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

    @property
    def task(self) -> str:
        """The task, or the weighted tasks, by which the plan was chosen."""
        return judged_by(self.weights)

    @property
    def predicted(self) -> Predicted:
        """The predicted score on the scale of `measured`, as it is shown."""
        return as_measured(self.candidate.predicted, self.weights).possible

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
        predicted = {task: Predicted(**one) for task, one in data["predicted"].items()}
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
        )

    def dumps(self) -> str:
        """The recommendation as JSON text, with null for what is not finite."""
        return json.dumps(finite(self.to_json()), indent=1)


def judge(
    study: Study,
    candidates: Sequence[Candidate],
    rival: Candidate | None,
    measured: Study | Mapping[str, pd.DataFrame],
    weights: Mapping[str, float] | None = None,
    floors: Mapping[str, float] | None = None,
    *,
    fresh: bool = True,
    provenance: Provenance | None = None,
) -> Recommendation:
    """Choose the candidate of one budget that is likely best, and compare it with the best uniform plan, the rival.

    measured: a study in which they were run, or plan key -> per-example scores (task, example, cluster, score), on
    the same examples for all. Candidates without measurements are left out. weights: how much each task counts; by
    default the study's first alone. floors: task -> share of full precision to keep; candidates that keep them come
    before others. fresh: these examples had no part in finding the candidates.

    Measured scores are shrunk towards predictions, since the highest of several noisy ones was partly lucky. The rival
    is recommended only if it is clearly better than the best candidate.
    """
    weights = weights or {study.tasks[0]: 1.0}
    native = Plan.uniform(study.parts, None)
    plans = [native, *(candidate.plan for candidate in (*candidates, *([rival] if rival else [])))]
    frames = _frames(measured, plans) if isinstance(measured, Study) else measured
    full = {task: _full(study, frames.get(native.key), task) for task in weights}
    rows = {plan.key: _weighed(frames[plan.key], weights, full) for plan in plans if plan.key in frames}
    run = [c for c in candidates if c.plan.key in rows]
    if not run:
        return unmeasured(study, candidates, weights, provenance)
    scores = {key: summarize(frame["score"], frame["cluster"]) for key, frame in rows.items()}
    steadied = [
        _weighed(one, weights, full) for one in steadied_rows(study, weights, [frames[c.plan.key] for c in run])
    ]
    likely = shrunk_scores([as_measured(c.predicted, weights) for c in run], steadied)
    floors = floors if floors and native.key in frames else {}
    kept = {plan.key: _kept(frames, plan, native, floors) for plan in plans if plan.key in rows}
    missed = {key: sum(one[task].mean < share for task, share in floors.items()) for key, one in kept.items()}
    best = min(zip(run, likely, strict=True), key=lambda one: (missed[one[0].plan.key], -one[1]))[0]
    # `len(run)` corrects each interval for having picked the best of that many
    against_rival = None
    if rival is not None and rival.plan.key in rows and rival.plan.key != best.plan.key:
        against_rival = compare_with_plan(
            rows[best.plan.key], rows[rival.plan.key], rival.plan, "the best uniform plan", len(run)
        )
    words = against_rival.words if against_rival else _without_rival(best, rival)
    if rival is not None and against_rival is not None and against_rival.verdict == "worse":
        if missed[rival.plan.key] > missed[best.plan.key]:
            words += " It misses a floor that this plan keeps."
        else:
            best, against_rival, words = rival, None, f"A uniform plan is the best choice here. {words}"
    words += "".join(floor_in_words(task, share, kept[best.plan.key][task]) for task, share in floors.items())
    by_task = {
        str(task): summarize(rows["score"], rows["cluster"]) for task, rows in frames[best.plan.key].groupby("task")
    }
    run_on = (provenance or {}).get("verified", study.meta)
    words += _at_chance({task: by_task[task] for task in weights}, full, run_on.get("chance") or {})
    others = tuple(
        compare_with_plan(rows[best.plan.key], rows[c.plan.key], c.plan, "the runner-up", len(run))
        for c in run
        if c.plan.key != best.plan.key
    )
    return Recommendation(
        weights,
        best.budget,
        best.plan,
        best.size,
        best,
        scores[best.plan.key],
        scores.get(native.key),
        against_rival,
        others,
        fresh,
        words,
        provenance_of(study) | (provenance or {}),
        by_task,
    )


def judged_by(weights: Mapping[str, float]) -> str:
    """The name of a single task, or weighted tasks as in '0.75 vqa + 0.25 ground'."""
    total = sum(weights.values())
    return next(iter(weights)) if len(weights) == 1 else " + ".join(f"{w / total:.2g} {t}" for t, w in weights.items())


def _frames(measured: Study, plans: Sequence[Plan]) -> dict[str, pd.DataFrame]:
    """Per-example scores of those plans that a study measured, by plan key."""
    return {plan.key: frame for plan in plans if (frame := measured.examples(plan)) is not None}


def _kept(
    frames: Mapping[str, pd.DataFrame], plan: Plan, native: Plan, floors: Mapping[str, float]
) -> dict[str, Score]:
    """The share of full precision that a plan keeps on each task with a floor."""
    return {
        task: kept_of(_of_task(frames[plan.key], task), _of_task(frames[native.key], task), share)
        for task, share in floors.items()
    }


def _at_chance(
    scores: Mapping[str, Score], full: Mapping[str, float | None], chance: Mapping[str, float | None]
) -> str:
    """A sentence if a plan scores no better than chance on a task on which full precision does."""
    lost = [
        f"{task} ({score.mean:.3f}, chance {level:.3f})"
        for task, score in scores.items()
        if (level := chance.get(task)) is not None and score.low <= level < (full[task] or 0.0)
    ]
    return f" It is no better than chance at {' and '.join(lost)}: do not use it, ask for more bits." if lost else ""


def _without_rival(best: Candidate, rival: Candidate | None) -> str:
    """The verdict where there is no comparison with a uniform plan."""
    if rival is None:
        return "No uniform plan meets these conditions."
    same = best.plan.key == rival.plan.key
    return "A uniform plan is the best choice here." if same else "The best uniform plan was not measured."


def unmeasured(
    study: Study,
    candidates: Sequence[Candidate],
    weights: Mapping[str, float] | None = None,
    provenance: Provenance | None = None,
) -> Recommendation:
    """A recommendation by prediction alone, such as from an imported table, which has no model to run."""
    best = candidates[0]
    return Recommendation(
        weights or {study.tasks[0]: 1.0},
        best.budget,
        best.plan,
        best.size,
        best,
        provenance=provenance_of(study) | (provenance or {}),
        words="Predicted only: nothing was run to check it.",
    )


def provenance_of(study: Study) -> Provenance:
    """Where a plan came from: the study's metadata, and the trials that were read."""
    trials = study.measured()
    return {
        "study": study.meta,
        "model": study.parts.model,
        "by": study.parts.by,
        "trials": len(trials),
        "trial_keys": sorted({trial.key for trial in trials}),
        "read": digest(study),
    }


def digest(study: Study) -> str:
    """A hash of the plans and scores of a study, which changes when the study grows."""
    trials = sorted(json.dumps([trial.key, trial.scores], sort_keys=True) for trial in study.measured())
    return hashlib.sha256("\n".join(trials).encode()).hexdigest()[:16]


def _of_task(frame: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows of one task, of which there must be some."""
    rows = frame[frame["task"] == task]
    if not len(rows):
        raise UserError(f"no trial has a score for '{task}'")
    return rows


def _full(study: Study, native: pd.DataFrame | None, task: str) -> float:
    """Full precision's score on these examples; where it was not run on them, on the study's own."""
    return observations_of(study, task).full if native is None else float(_of_task(native, task)["score"].mean())


def _weighed(frame: pd.DataFrame, weights: Mapping[str, float], full: Mapping[str, float]) -> pd.DataFrame:
    """Examples of all weighted tasks, scaled so that their mean is the weighted mean of shares of full precision.

    They are in one table, so that standard errors are clustered by image over all tasks: two tasks about the same
    images are not independent evidence.
    """
    if len(weights) == 1:
        return _of_task(frame, next(iter(weights)))
    each = {task: _of_task(frame, task) for task in weights}
    # the mean over all rows weights a task by its number of examples: that is divided out, its weight multiplied in
    rows, total = sum(map(len, each.values())), sum(weights.values())
    return pd.concat([
        one.assign(
            example=f"{task} " + one["example"].astype(str),
            score=one["score"] * rows / len(one) * weights[task] / total / (full[task] or 1.0),
        )
        for task, one in each.items()
    ])  # fmt: skip
