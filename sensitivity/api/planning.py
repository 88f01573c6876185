"""A plan in minutes: scores from one calibration give opening plans, and few evaluations decide between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Unpack

import numpy as np

from sensitivity.analysis.allocate.budget import Candidate, mean_share
from sensitivity.analysis.allocate.by_scores import combined, met_budgets, optimum
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.allocate.neighbors import plans_near
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.recommending.believed import predicted_shares, read_shares
from sensitivity.analysis.recommending.kept_recommendation import Proposed, best_of, proposed, recommended
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.search.openings import openings_then_proposals
from sensitivity.api.sweeping import SweepOptions, begin_sweep, path_for
from sensitivity.measure.attribution.scores import Attribution
from sensitivity.measure.attribution.weight_errors import groups_that_fit
from sensitivity.measure.loop import Step, data_flow_order
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import Allowed, allowed_by, tied_groups
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.rules import violations
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import budget_bits, size
from sensitivity.study.storage import expected
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Task

MAX_EVALUATIONS = 10  # real evaluations, full precision included
# the scores whose best plans are measured first; `change` takes a backward pass for each group of blocks whose errors
# fit into memory, so that large models do without it, and without right answers in words there is no gradient
OPENING = "change", "swing", "kfac"
OF_LARGE_MODELS, WITHOUT_ANSWERS = ("swing", "kfac", "gram"), ("gram",)
MOST_PASSES = 4
VERIFIED, OF_SEVERAL = 3, 2  # plans that are verified for one budget, and for each of several, which share many
EXPECTED = "swing"  # the score from which the surrogate starts, where it was computed
FEWER_EXAMPLES = 4  # how many times fewer examples the search runs plans on than the verification
MIN_EXAMPLES = 100  # examples that the search runs plans on at least: fewer would save little time
# in a search of more trials than the default: the gain, as a share of full precision, that is worth a measurement, and
# the share from which on there is little left to gain
WORTH, ALL_BUT = 0.001, 0.995
ENOUGH = 0.9  # a budget whose best measured plan keeps a lower share of full precision is searched to the last trial


def opening_scores(tasks: Sequence[Task], parts: ComponentMap, schemes: Sequence[Scheme]) -> tuple[str, ...]:
    """The scores that give opening plans."""
    if any(task.gallery for task in tasks):
        return WITHOUT_ANSWERS
    return OPENING if len(groups_that_fit(parts, len(schemes))) <= MOST_PASSES else OF_LARGE_MODELS


def search_examples(n: int, tasks: Sequence[Task]) -> int:
    """How many examples the search runs plans on; a gallery of fewer images would be another task."""
    return n if any(task.gallery for task in tasks) else min(n, max(n // FEWER_EXAMPLES, MIN_EXAMPLES))


def plans_to_verify(budgets: Sequence[float]) -> int:
    """How many plans are verified for each of these budgets unless a user says."""
    return VERIFIED if len(budgets) == 1 else OF_SEVERAL


@dataclass(frozen=True)
class Planning:
    """A plan search under way: the study, its steps, and what they search for."""

    study: Study
    steps: Iterator[Step]
    request: PlanRequest
    openings: tuple[Plan, ...]

    def proposals(self) -> Proposed:
        """For each budget, the plans to verify and the best uniform plan; call it after all steps have run."""
        return candidates(self.study, self.request, self.openings)


def begin_plan(
    vlm: VLM,
    parts: ComponentMap,
    tasks: Sequence[str],
    out: Path | str,
    request: PlanRequest,
    scores: Sequence[Attribution],
    trials: int = MAX_EVALUATIONS,
    **options: Unpack[SweepOptions],
) -> Planning:
    """Begin a search that measures at most `trials` plans.

    The best plans of each score come first, for the smallest budgets before others. Then the surrogate, which starts
    from the scores and learns from measurements, proposes plans as long as they gain; with more trials than the
    default, also such as may gain.
    """
    openings = opening_plans(parts, request, scores)

    def plans(study: Study) -> Iterable[Plan]:
        named = {one.name: one.scores for one in scores}
        if EXPECTED in named:  # alone it foretells better than the mean of several
            named = {EXPECTED: named[EXPECTED]}
        expected.save(study.path, combined(list(named.values())), ", ".join(named))
        # in this order neighboring plans share most of their forward passes
        first = sorted(openings[: trials - 1], key=data_flow_order)
        propose = partial(proposal, request=replace(request, weights=weights_of(study)), trials=trials)
        return openings_then_proposals(study, first, propose, trials)

    options["runtime"] = request.runtime
    study, steps = begin_sweep(vlm, parts, plans, tasks, out, **options)
    return Planning(study, steps, replace(request, weights=weights_of(study)), openings)


def weights_of(study: Study) -> dict[str, float]:
    """The same weight for each task of a study."""
    return dict.fromkeys(study.tasks, 1.0)


def opening_plans(parts: ComponentMap, request: PlanRequest, scores: Sequence[Attribution]) -> tuple[Plan, ...]:
    """The best plan of each score for each budget, the smallest budgets first: there plans differ most."""
    allow, tie = allowed_and_tied(parts, request)
    budgets = sorted(request.bpw)
    best = [optimum(parts, one.scores, bpw, request.runtime, allow, tie) for bpw in budgets for one in scores]
    return tuple(plan for plan in dict.fromkeys(best) if not plan.is_native)


def proposal(study: Study, request: PlanRequest, trials: int) -> Iterator[Plan]:
    """Plans worth a measurement, the one with the largest expected gain over a budget's best measured plan first.

    First the surrogate's best plan for each budget, by predicted gain. A gain below the standard error of one measured
    score is left to the verification, which runs more examples. Where nothing gains and a budget's best plan still
    loses much, scores and surrogate misjudge the model: then plans near the best ones are measured, whatever they gain.
    With more trials than the default, such plans are measured for the other budgets, too, while one may gain (with ten,
    that found no better plans).
    """
    thorough = trials > MAX_EVALUATIONS
    knapsack = Knapsack.of(study, list(request.weights), files_of(request.runtime))
    total = sum(request.weights.values())
    noise = sum(
        weight / total * (observations_of(study, task).noise or 0.0) / (knapsack.full(task) or 1.0)
        for task, weight in request.weights.items()
    )
    gains: list[tuple[float, Plan, float]] = []
    nearby: list[tuple[float, Plan, float]] = []
    for bpw, known in zip(request.bpw, kept_shares(study, request, knapsack), strict=True):
        most = max(known.values(), default=-1.0)
        best = best_of(study, replace(request, top=1), bpw, knapsack)[0]
        if (gain := mean_share(best.predicted, request.weights) - most) > noise:
            gains.append((gain, best.plan, bpw))
        misjudged = most < ENOUGH
        if not known or (not misjudged and not (thorough and most < ALL_BUT)):
            continue
        near = plans_near(
            knapsack,
            budget_bits(study.parts, bpw),
            request.weights,
            known,
            None if misjudged else best.plan,
            _limits(study.parts, request),
            np.random.default_rng(len(study.measured())),
        )
        nearby += [(gain, plan, bpw) for gain, plan in near if misjudged or gain > WORTH]
    for found in (gains, nearby):
        for _, plan, bpw in sorted(found, key=lambda one: -one[0]):
            if _fits(study.parts, plan, bpw, request):  # `plans_near` adds up sizes of parts, which is nearly exact
                yield plan


def kept_shares(study: Study, request: PlanRequest, knapsack: Knapsack) -> list[dict[Plan, float]]:
    """For each budget, the share of full precision that each measured plan within it is believed to keep."""
    scores = predicted_shares(study, knapsack, request.weights)
    known = {trial.plan: scores[trial.key] for trial in study.measured() if trial.key in scores}
    return [
        {plan: share for plan, share in known.items() if _fits(study.parts, plan, bpw, request)} for bpw in request.bpw
    ]


def candidates(study: Study, request: PlanRequest, openings: Sequence[Plan]) -> Proposed:
    """For each budget, the few plans that are expected to be best, and the best uniform plan.

    In turn that of the highest belief and that of the highest reading: beliefs smooth the noise of measured scores,
    but start from scores of calibration data, which may be wrong. Measured plans are believed to keep their
    `predicted_shares`; the surrogate's best, and opening plans that were not measured, their predicted score.
    """
    knapsack = Knapsack.of(study, list(request.weights), files_of(request.runtime))
    scores = predicted_shares(study, knapsack, request.weights)
    read = read_shares(study, request.weights)
    per_budget: Proposed = []
    for bpw, (ranked, rival) in zip(request.bpw, proposed(study, replace(request, top=1)), strict=True):
        plans = [trial.plan for trial in study.measured() if trial.key in scores and not trial.plan.is_native]
        plans = list(dict.fromkeys([*plans, *openings, ranked[0].plan]))
        fitting = [plan for plan in plans if _fits(study.parts, plan, bpw, request)]
        known = [
            Candidate(plan, knapsack.size(plan), ranked[0].budget, 0, predicted)
            for plan, predicted in zip(fitting, knapsack.predicted(fitting), strict=True)
        ]
        believed = sorted(known, key=lambda one: -scores.get(one.plan.key, mean_share(one.predicted, request.weights)))
        readings = sorted((one for one in known if one.plan.key in read), key=lambda one: -read[one.plan.key])
        in_turn = {one.plan: one for pair in zip_longest(believed, readings) for one in pair if one is not None}
        chosen = list(in_turn.values())[: request.top]
        per_budget.append(([replace(one, rank=rank) for rank, one in enumerate(chosen)], rival))
    return per_budget


def meetable(parts: ComponentMap, schemes: Sequence[Scheme], request: PlanRequest) -> tuple[PlanRequest, list[str]]:
    """The request for those budgets that some plan meets, and a sentence for each other one; nothing is calibrated."""
    allow, tie = allowed_and_tied(parts, request)
    met, unmet = met_budgets(parts, schemes, request.bpw, request.runtime, allow, tie)
    return replace(request, bpw=met), unmet


def was_found(out: Path, request: PlanRequest) -> bool:
    """Whether the plans that a study holds as its recommendations are verified ones for the same request."""
    if (study := Study.begun(out)) is None:
        return False
    saved, asked = recommended(study), replace(request, weights=weights_of(study)).to_json()
    return bool(saved) and all(one.measured and one.provenance.get("asked") == asked for one in saved)


def goes_on(out: Path, request: PlanRequest, trials: int) -> bool:
    """Whether the search that found a study's plans would measure further ones, had it trials left."""
    study = Study(out)
    known = {trial.key for trial in study.trials()}
    asked = replace(request, weights=weights_of(study))
    return any(plan.key not in known for plan in proposal(study, asked, trials))


def check_float_path(schemes: Sequence[Scheme], path: str | None) -> None:
    """Raise an error for a calibration path on which single components have no score."""
    if (used := path_for(schemes, path)) != "float":
        raise UserError(
            f"scores of single components need the float path: on the path {used} a component's inputs differ from "
            f"plan to plan; leave out --path, or choose a --method that does not need the path {used}"
        )


def allowed_and_tied(parts: ComponentMap, request: PlanRequest) -> tuple[Allowed | None, list[tuple[str, ...]]]:
    """Which choices a request allows, and which components it ties."""
    return allowed_by(parts.names, request.allow), tied_groups(parts.names, request.tie)


def _limits(parts: ComponentMap, request: PlanRequest) -> Callable[[Plan], bool]:
    """Whether a plan meets all limits of a request but the budget."""
    allow, tie = allowed_and_tied(parts, request)
    return lambda plan: (
        (allow is None or all(allow(*one) for one in plan.schemes))
        and all(len({plan[name] for name in group}) == 1 for group in tie)
        and not (request.runtime and violations(parts, plan, request.runtime))
    )


def _fits(parts: ComponentMap, plan: Plan, bpw: float, request: PlanRequest) -> bool:
    """Whether a plan meets a budget and all limits of a request."""
    small = size(parts, plan, files_of(request.runtime)).bits <= budget_bits(parts, bpw)
    return small and _limits(parts, request)(plan)
