"""Saved recommendations of a study: written beside it, read back, and compared with what would be recommended now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sensitivity.analysis.allocate.budget import Candidate, Wish, best_uniform, solve
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.legal import candidates as legal_candidates
from sensitivity.analysis.allocate.recommendation import Recommendation, digest
from sensitivity.analysis.observations import check_task
from sensitivity.spec import schema
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed, allowed_by, tied_groups
from sensitivity.spec.plan import Plan
from sensitivity.spec.plan_file import write_file
from sensitivity.spec.runtimes import files_of, violations
from sensitivity.study.study import Study

FIRST = "plan.json"
MEND = "`sensitivity recommend` writes it anew; or delete it"
# keys that `recommend` writes into a plan.json; one that `export` or a user wrote lacks them
SAID = ("task_weights", "budget_bpw", "stored_size", "predicted", "candidates", "fresh_examples", "verdict", "by_task")


def remember(study: Study, found: Sequence[Recommendation]) -> list[Path]:
    """Write recommendations with their provenance into the study's folder, the first as plan.json; return the files."""
    asked = [float(bpw) for bpw in found[0].provenance.get("asked", {}).get("bpw", ())] or [one.budget for one in found]
    return [
        write_file(study.parts, one.plan, {**one.to_json(), "stored_size": one.size.to_json()}, study.path / name)
        for one, name in zip(found, _names(asked), strict=True)
    ]


def _names(budgets: Sequence[float]) -> list[str]:
    """The file of each budget's recommendation."""
    return [FIRST, *(f"plan-{bpw:g}bpw.json" for bpw in budgets[1:])]


def recommended(study: Study) -> list[Recommendation]:
    """The recommendations that were last saved for a study, unchanged; an empty list without any."""
    if not (study.path / FIRST).exists():
        return []
    first = schema.read(study.path / FIRST, "plan", MEND)
    if "asked" not in first.get("provenance", {}):
        return []
    names = _names(first["provenance"]["asked"]["bpw"])
    others = [study.path / name for name in names[1:] if (study.path / name).exists()]
    files = {study.path / FIRST: first, **{file: schema.read(file, "plan", MEND) for file in others}}
    asked = first["provenance"]["asked"]
    # files of an earlier call for other budgets may still lie beside the last one's
    return [_read(study, file, one) for file, one in files.items() if one.get("provenance", {}).get("asked") == asked]


def _read(study: Study, file: Path, data: dict[str, Any]) -> Recommendation:
    """A recommendation from its file, checked against the study."""

    def wrong(why: str) -> UserError:
        return UserError(f"{file} cannot be used: {why}; {MEND}")

    if lacking := [name for name in SAID if name not in data]:
        raise wrong(f"'{lacking[0]}' is missing")
    plan, weights = Plan.from_json(data["plan"]), data["task_weights"]
    if plan.key != data["key"]:
        raise wrong("its plan is not the one that was recommended, as it was changed")
    if lost := [task for task in weights if task not in data["predicted"] or task not in study.tasks]:
        raise wrong(f"it says nothing about '{lost[0]}'" if lost[0] in study.tasks else f"'{lost[0]}' is no task here")
    try:
        return Recommendation.from_json(data, study.parts)
    except UserError as error:
        raise wrong(str(error)) from error


def since(study: Study, chosen: Sequence[Recommendation]) -> list[str]:
    """Sentences on how far a study has grown since these recommendations, and what would be recommended now."""
    asked = chosen[0].provenance.get("asked") if chosen else None
    if asked is None or chosen[0].provenance.get("read") in (None, digest(study)):
        return []
    before, now = chosen[0].provenance.get("trials", 0), len(study.measured())
    how = f"from {before:,} to {now:,} plans" if before != now else f"by further examples of its {now:,} plans"
    told = [f"The study has grown {how} since this was recommended; what is said of it here is what was found then."]
    wish = Wish.from_json(asked)
    try:
        fresh = proposed(study, wish)
    except UserError as error:
        return [*told, f"Nothing could be recommended now: {error}."]
    ours = {f"{one.budget:.4g}": one.plan for one in chosen}
    for bpw, (candidates, _) in zip(wish.bpw, fresh, strict=True):
        best = candidates[0]
        old = ours.get(f"{best.budget:.4g}")
        if old is not None and best.plan.key == old.key:
            told.append(f"Asked again for {bpw:g} bpw, the same plan is predicted to be best.")
            continue
        score = "; ".join(f"{task} {best.predicted[task].score:.3f}" for task in wish.weights)
        told.append(
            f"Asked again for {bpw:g} bpw, {best.plan.describe()} is predicted to be best ({score}, not yet run): "
            f"`sensitivity recommend {study.path} --bpw {bpw:g}` verifies it."
        )
    return told


Proposed = list[tuple[list[Candidate], Candidate | None]]


def check_wish(study: Study, wish: Wish) -> tuple[Allowed | None, list[tuple[str, ...]]]:
    """Check a wish before anything is solved or loaded; return which choices it allows and which components it ties."""
    for task in (*wish.weights, *wish.floors):
        check_task(study, task)
    files_of(wish.runtime)
    return allowed_by(study.parts.names, wish.allow), tied_groups(study.parts.names, wish.tie)


def proposed(study: Study, wish: Wish) -> Proposed:
    """For each budget, the best few plans by prediction, and the best uniform plan under the same conditions."""
    runtime, (allow, tie) = wish.runtime, check_wish(study, wish)
    knapsack = Knapsack.of(study, list(dict.fromkeys([*wish.weights, *wish.floors])), files_of(runtime))

    def fits(plan: Plan) -> bool:
        return not (runtime and violations(study.parts, plan, runtime)) and all(
            allow is None or allow(*one) for one in plan.schemes
        )

    found: Proposed = []
    for bpw in wish.bpw:
        if runtime:
            best = legal_candidates(
                study, runtime, bpw, None, wish.top, wish.weights, wish.floors, allow, tie, knapsack
            )
        else:
            best = solve(
                study, bpw=bpw, weights=wish.weights, floors=wish.floors, allowed=allow, tied=tie, top=wish.top,
                knapsack=knapsack,
            )  # fmt: skip
        found.append((best, best_uniform(knapsack, bpw, wish.weights, wish.floors, fits)))
    return found
