"""Recommendations saved in a study: written, read back, and compared with what would be recommended now."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from sensitivity.analysis.allocate.budget import Candidate, best_of_each, best_uniform, solve
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.legal import candidates as legal_candidates
from sensitivity.analysis.allocate.run_time_limits import RunTimeLimits, check_limits
from sensitivity.analysis.observations import check_task
from sensitivity.analysis.recommending.recommendation import Recommendation, RecommendationJson, digest
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.spec import schema
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.files import check_may_replace
from sensitivity.spec.limits import Allowed, allowed_by, tied_groups
from sensitivity.spec.plan import Plan
from sensitivity.spec.plan_file import why_foreign, write_file
from sensitivity.spec.runtimes.layer_times import LayerTimes
from sensitivity.spec.runtimes.rules import violations
from sensitivity.spec.runtimes.table import files_of
from sensitivity.study.storage import layer_times, paths
from sensitivity.study.storage.expected import read as read_expected
from sensitivity.study.study import Study

Proposed = list[tuple[list[Candidate], Candidate | None]]  # for each budget
REPAIR = "move it away, and `sensitivity recommend` writes a new one"
# keys that `recommend` writes into a plan.json; one that `export` or a user wrote lacks them
KEYS = ("task_weights", "budget_bpw", "stored_size", "predicted", "candidates", "fresh_examples", "verdict", "by_task")


def save(study: Study, recommendations: Sequence[Recommendation]) -> list[Path]:
    """Write recommendations with their provenance into the study's folder, the first as plan.json; return the files."""
    files = files_for(study.path, budgets_asked(recommendations))
    for file in files:
        check_may_replace(file, why_foreign)
    return [
        write_file(study.parts, one.plan, {**one.to_json(), "stored_size": one.size.to_json()}, file)
        for one, file in zip(recommendations, files, strict=True)
    ]


def files_for(study: Path, budgets: Sequence[float]) -> list[Path]:
    """The file of each budget's recommendation in a study's folder."""
    return [paths.recommendation_file(study), *(paths.recommendation_file(study, bpw) for bpw in budgets[1:])]


def budgets_asked(recommendations: Sequence[Recommendation]) -> list[float]:
    """The budgets that were asked for, by which files are named."""
    asked = recommendations[0].provenance.get("asked")
    return list(asked["bpw"]) if asked else [one.budget for one in recommendations]


def moved_files(study: Path, budgets: Sequence[float]) -> dict[Path, Path]:
    """The files that another name suits better once these budgets' plans are saved, each with that name.

    The plan.json of another budget gets its budget's name; an earlier plan for the first of these becomes plan.json.
    """
    first, *others = files_for(study, budgets)
    own, moved = paths.recommendation_file(study, budgets[0]), {}
    if (budget := budget_of(first)) is not None:
        its = paths.recommendation_file(study, budget)
        if its not in (own, *others):
            moved[first] = its
    if own not in others and budget_of(own) is not None:
        moved[own] = first
    return moved


def budget_of(file: Path) -> float | None:
    """The budget of a saved recommendation; None where the file is missing or no recommendation."""
    if not file.exists() or why_foreign(file):
        return None
    budget = schema.read(file, "plan", REPAIR).get("budget_bpw")
    return None if budget is None else float(budget)


def instead_of(study: Study, predicted: Recommendation) -> Recommendation | None:
    """The verified plan that is saved for the same budget and request as one that is only predicted; None without one.

    It comes with the request of the predicted one, so that both are saved with the plans for other budgets.
    """
    if (request := predicted.provenance.get("asked")) is None:
        return None
    for saved in verified_for(study, predicted.budget).values():
        asked = saved.provenance.get("asked")
        # other budgets and the number of candidates do not matter to a plan that was verified
        if asked and {**asked, "bpw": 0, "top": 0} == {**request, "bpw": 0, "top": 0}:
            return replace(saved, provenance={**saved.provenance, "asked": request})
    return None


def verified_for(study: Study, bpw: float) -> dict[Path, Recommendation]:
    """The files of plans that were verified for a budget, with what they say."""
    found = {}
    for file in (paths.recommendation_file(study.path), paths.recommendation_file(study.path, bpw)):
        if (budget := budget_of(file)) is None or f"{budget:g}" != f"{bpw:g}":
            continue
        with suppress(UserError):  # it was changed: nothing vouches for its verification
            found[file] = _read(study, file, cast(RecommendationJson, schema.read(file, "plan", REPAIR)))
    return {file: one for file, one in found.items() if one.measured}


def recommended(study: Study) -> list[Recommendation]:
    """The recommendations that were last saved for a study, as they were saved; an empty list if there are none."""
    if not paths.recommendation_file(study.path).exists():
        return []
    first = schema.read(paths.recommendation_file(study.path), "plan", REPAIR)
    asked = first.get("provenance", {}).get("asked")
    if asked is None:
        return []
    first_file, *others = files_for(study.path, asked["bpw"])
    saved = {first_file: first, **{file: schema.read(file, "plan", REPAIR) for file in others if file.exists()}}
    return [
        _read(study, file, cast(RecommendationJson, plan))  # checked by the schema
        for file, plan in saved.items()
        # files of an earlier call for other budgets may still lie beside the last one's
        if plan.get("provenance", {}).get("asked") == asked
    ]


def _read(study: Study, file: Path, data: RecommendationJson) -> Recommendation:
    """A recommendation from its file, checked against the study."""

    def wrong(why: str) -> UserError:
        return UserError(f"{file} cannot be used: {why}; {REPAIR}")

    if missing := [name for name in KEYS if name not in data]:
        raise wrong(f"'{missing[0]}' is missing")
    plan, weights = Plan.from_json(data["plan"]), data["task_weights"]
    if plan.key != data["key"]:
        raise wrong("its plan is not the one that was recommended, as it was changed")
    for task in weights:
        if task not in study.tasks:
            raise wrong(f"'{task}' is no task here")
        if task not in data["predicted"]:
            raise wrong(f"it says nothing about '{task}'")
    try:
        return Recommendation.from_json(data, study.parts)
    except UserError as error:
        raise wrong(str(error)) from error


def what_changed_since(study: Study, recommendations: Sequence[Recommendation]) -> list[str]:
    """Sentences on how far a study has grown since these recommendations, and what would be recommended now."""
    asked = recommendations[0].provenance.get("asked") if recommendations else None
    if asked is None or recommendations[0].provenance.get("read") in (None, digest(study)):
        return []
    before, now = recommendations[0].provenance.get("trials", 0), len(study.measurements())
    how = f"from {before:,} to {now:,} plans" if before != now else f"by further examples of its {now:,} plans"
    sentences = [
        f"The study has grown {how} since this was recommended; what is said of it here is what was found then."
    ]
    request = PlanRequest.from_json(asked)
    typed = request.typed
    try:
        fresh = proposed(study, request, layer_times.read(study.path))
    except UserError as error:
        return [*sentences, f"Nothing could be recommended now: {error}."]
    saved_plans = {f"{one.budget:.4g}": one.plan for one in recommendations}
    for bpw, (candidates, _) in zip(request.bpw, fresh, strict=True):
        best = candidates[0]
        saved = saved_plans.get(f"{best.budget:.4g}")
        if saved is not None and best.plan.key == saved.key:
            sentences.append(f"Asked again for {bpw:g} bpw, the same plan is predicted to be best.")
            continue
        score = "; ".join(f"{task} {best.predicted[task].possible.score:.3f}" for task in request.weights)
        sentences.append(
            f"Asked again for {bpw:g} bpw, {best.plan.describe()} is predicted to be best ({score}, not yet run): "
            f"`sensitivity recommend {shell_word(study.path)} --bpw {bpw:g} {typed}` verifies it."
        )
    return sentences


def check_request(study: Study, request: PlanRequest) -> tuple[Allowed | None, list[tuple[str, ...]]]:
    """Check a request before anything is solved; return which choices it allows, and which components it ties."""
    for task in (*request.weights, *request.floors):
        check_task(study, task)
    files_of(request.runtime)
    check_limits(request.limits, request.runtime)
    return allowed_by(study.parts.names, request.allow), tied_groups(study.parts.names, request.tie)


def proposed(study: Study, request: PlanRequest, times: LayerTimes | None = None) -> Proposed:
    """For each budget, the best few plans by prediction, and the best uniform plan under the same conditions.

    times: the times of layers in the runtime, which a request with limits needs.
    """
    runtime, (allow, _) = request.runtime, check_request(study, request)
    if request.limits and times is None:
        remedy = f"`sensitivity profile {shell_word(study.parts.model)} --runtime {runtime}`"
        raise UserError(f"limits on time or memory need the times of layers: {remedy}")
    limits = RunTimeLimits(times, request.limits) if times is not None and request.limits else None
    tasks = list(dict.fromkeys([*request.weights, *request.floors]))
    # damages that are expected may be wrong: then the best plan by what was measured alone is a candidate, too
    with_and_without = [True, False] if request.top > 1 and read_expected(study.path) is not None else [True]
    knapsacks = [Knapsack.of(study, tasks, files_of(runtime), limits, expecting) for expecting in with_and_without]

    def fits(plan: Plan) -> bool:
        return not (runtime and violations(study.parts, plan, runtime)) and all(
            allow is None or allow(*one) for one in plan.schemes
        )

    return [
        (
            best_of_each(knapsacks, partial(best_of, study, request, bpw), request.top),
            best_uniform(knapsacks[0], bpw, request.weights, request.floors, fits),
        )
        for bpw in request.bpw
    ]


def best_of(study: Study, request: PlanRequest, bpw: float, knapsack: Knapsack) -> list[Candidate]:
    """The best few plans for a budget by the predictions of a knapsack, under the request's conditions."""
    runtime, (allow, tie) = request.runtime, check_request(study, request)
    if runtime:
        return legal_candidates(
            study, runtime, bpw, None, request.top, request.weights, request.floors, allow, tie, knapsack
        )
    return solve(
        study,
        bpw=bpw,
        weights=request.weights,
        floors=request.floors,
        allowed=allow,
        tied=tie,
        top=request.top,
        knapsack=knapsack,
    )
