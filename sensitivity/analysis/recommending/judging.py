"""Judging measured candidates: which plan is likely best, and whether it beats the best uniform plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from sensitivity.analysis.allocate.budget import Candidate, as_measured
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.recommending.believed import shrunk_scores, steadied_rows
from sensitivity.analysis.recommending.comparison import Comparison, compare_with_plan, floor_in_words, kept_of
from sensitivity.analysis.recommending.recommendation import Provenance, Recommendation, provenance_of, warning
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import budget_bits, size
from sensitivity.study.scores import Score, paired_difference, summarize
from sensitivity.study.storage.paths import is_study, verification_folder
from sensitivity.study.study import Study

ROUNDING = 1e-9  # scores closer than this differ by the order of their sums alone


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

    Intervals allow for having picked the best of all plans that ran on these examples and fit the budget, also of those
    that an earlier call ran.

    Measured scores are shrunk towards predictions, since the highest of several noisy ones was partly lucky. The rival
    is recommended if it is clearly better than the best candidate, or if it is smaller and neither scores lower nor is
    believed to.
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
    scores = {key: _score(frame, rows.get(native.key) if len(weights) > 1 else None) for key, frame in rows.items()}

    def believed(of: Sequence[Candidate]) -> list[float]:
        """The scores of these candidates, with all of them shrunk towards predictions together."""
        steadied = steadied_rows(study, weights, [frames[c.plan.key] for c in of])
        rows_of = [_weighed(one, weights, full) for one in steadied]
        return shrunk_scores([as_measured(c.predicted, weights) for c in of], rows_of)

    floors = floors if floors and native.key in frames else {}
    kept = {plan.key: _kept(frames, plan, native, floors) for plan in plans if plan.key in rows}
    missed = {key: sum(one[task].mean < share for task, share in floors.items()) for key, one in kept.items()}
    best = min(zip(run, believed(run), strict=True), key=lambda one: (missed[one[0].plan.key], -one[1]))[0]
    tries = _tries(study, run, rival, measured)  # corrects each interval for having picked the best of that many
    best, against_rival, words = _against_rival(best, rival, rows, scores, missed, tries, believed, fresh)
    mine, runner_up = rows[best.plan.key], "the runner-up"
    others = tuple(
        compare_with_plan(mine, rows[c.plan.key], c.plan, runner_up, tries, scores[c.plan.key], fresh)
        for c in run
        if c.plan.key != best.plan.key
    )
    words = words or _without_rival(best, rival, others, bool(floors))
    by_task, full_by_task = _by_task(frames[best.plan.key]), _by_task(frames.get(native.key))
    words += "".join(
        floor_in_words(task, share, kept[best.plan.key][task], full_by_task[task].mean)
        for task, share in floors.items()
    )
    found = Recommendation(
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
        full_by_task,
    )
    return replace(found, words=words + warning(found))


def _tries(
    study: Study, run: Sequence[Candidate], rival: Candidate | None, measured: Study | Mapping[str, pd.DataFrame]
) -> int:
    """Among how many plans the choice was or could have been made, without full precision and the rival."""
    keys = {candidate.plan.key for candidate in run}
    if isinstance(measured, Study):
        most, format = budget_bits(study.parts, run[0].budget), run[0].size.format
        plans = {trial.key: trial.plan for trial in measured.measured()}
        keys |= {key for key, plan in plans.items() if size(study.parts, plan, format).bits <= most}
    return max(1, len(keys - {study.native.key, *([rival.plan.key] if rival else [])}))


def _score(rows: pd.DataFrame, full: pd.DataFrame | None) -> Score:
    """The score of weighed examples; with those of full precision, the share of it, whose interval is paired."""
    if full is None:
        return summarize(rows["score"], rows["cluster"])
    both = rows.merge(full, on="example", suffixes=("", "_full"))
    lost = paired_difference(both["score"], both["score_full"], both["cluster"])
    return replace(lost, mean=1 + lost.mean, low=1 + lost.low, high=1 + lost.high)


def _by_task(frame: pd.DataFrame | None) -> dict[str, Score]:
    """A plan's score on each task; empty for a plan that was not run."""
    groups = [] if frame is None else frame.groupby("task")
    return {str(task): summarize(rows["score"], rows["cluster"]) for task, rows in groups}


def _against_rival(
    best: Candidate,
    rival: Candidate | None,
    rows: Mapping[str, pd.DataFrame],
    scores: Mapping[str, Score],
    missed: Mapping[str, int],
    tries: int,
    believed: Callable[[Sequence[Candidate]], list[float]],
    fresh: bool,
) -> tuple[Candidate, Comparison | None, str]:
    """The plan to recommend, its comparison with the rival, and the verdict in words, if there is one.

    The rival is recommended instead where it misses no more floors, and is clearly better, or smaller and no worse.
    """
    if rival is None or rival.plan.key not in rows or rival.plan.key == best.plan.key:
        return best, None, ""
    mine, theirs = rows[best.plan.key], rows[rival.plan.key]
    found = compare_with_plan(mine, theirs, rival.plan, "the best uniform plan", tries, scores[rival.plan.key], fresh)
    keeps = missed[rival.plan.key] <= missed[best.plan.key]
    if found.verdict == "worse":
        if keeps:
            return rival, None, f"A uniform plan is the best choice here. {found.words}"
        return best, found, f"{found.words} It misses a floor that this plan keeps."
    if keeps and rival.size.bits < best.size.bits and found.difference.mean <= ROUNDING:
        of_best, of_rival = believed([best, rival])
        if of_rival >= of_best - ROUNDING:
            sizes = f"{rival.size.bpw:.2f} bpw instead of {best.size.bpw:.2f}"
            return rival, None, f"A uniform plan is chosen: it is smaller, {sizes}, and scores no lower. {found.words}"
    return best, found, found.words


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


def _without_rival(best: Candidate, rival: Candidate | None, others: Sequence[Comparison], floors: bool) -> str:
    """The verdict where there is no comparison with a uniform plan."""
    if rival is None:
        return f"No uniform plan {'is predicted to meet' if floors else 'meets'} these conditions."
    if best.plan.key != rival.plan.key:
        return "The best uniform plan was not measured."
    next_best = max(others, key=lambda other: other.score.mean, default=None)
    what = "no other plan was run." if next_best is None else f"the runner-up is {next_best.other.describe()}."
    return f"The chosen plan is a uniform one; {what}{f' {next_best.words}' if next_best else ''}"


def unmeasured(
    study: Study,
    candidates: Sequence[Candidate],
    weights: Mapping[str, float] | None = None,
    provenance: Provenance | None = None,
) -> Recommendation:
    """A recommendation by prediction alone, such as from an imported table, which has no model to run."""
    best = candidates[0]
    found = Recommendation(
        weights or {study.tasks[0]: 1.0},
        best.budget,
        best.plan,
        best.size,
        best,
        provenance=provenance_of(study) | (provenance or {}),
    )
    return replace(found, words=f"Predicted only: {_measured_before(study, best.plan)}.{warning(found)}")


def _measured_before(study: Study, plan: Plan) -> str:
    """In words, what an earlier verification, or else the study itself, measured of a plan that is not run now."""
    folder = verification_folder(study.path)
    for one, where in (
        *([(Study(folder), "an earlier verification")] if is_study(folder) else []),
        (study, "the study itself, which the prediction rests on,"),
    ):
        found = next((trial for trial in one.measured() if trial.key == plan.key), None)
        if found is not None:
            scores = (
                f"{task} {score['mean']:.3f}"
                + (f" [{low:.3f}, {score['high']:.3f}]" if low is not None else "")
                + (f" (mean of {score['repetitions']})" if "repetitions" in score else "")
                for task, score in found.scores.items()
                for low in [score.get("low")]  # an imported table has no intervals but those of repeated plans
            )
            return f"nothing was run now to check it; {where} measured {', '.join(scores)}"
    return "nothing was run to check it"


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
