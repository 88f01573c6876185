"""sensitivity plan: a plan for a budget within minutes, from one calibration and few evaluations, verified."""

from __future__ import annotations

import argparse
import math
import time
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.arguments.budgets import budgets_in_bpw, check_budget_flags
from sensitivity.cli.arguments.model_and_tasks import loaded
from sensitivity.cli.arguments.scheme_flags import checked, loadable_schemes
from sensitivity.cli.output.explained_tables import print_score_costs
from sensitivity.cli.output.progress import show_progress, show_progress_in_json, show_stages
from sensitivity.cli.output.tables import print_forecast, print_recommendation
from sensitivity.spec.errors import Partly

if TYPE_CHECKING:
    from sensitivity.analysis.recommending.kept_recommendation import Proposed
    from sensitivity.analysis.recommending.request import PlanRequest
    from sensitivity.api.scoring import Scored
    from sensitivity.models.vlm import VLM
    from sensitivity.spec.components import ComponentMap
    from sensitivity.spec.plan import Scheme
    from sensitivity.study.study import Study
    from sensitivity.tasks.examples.types import Task

ABOUT = "find a plan for a budget in minutes: scored on calibration data, decided by few evaluations, verified"
EXAMPLE = "sensitivity plan embedded:scenes-llava --task vqa --bpw 3 --out runs/quick"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_model(p)
    flags.add_tasks(p)
    flags.add_budgets(p)
    flags.add_granularity(p, "group.kind")
    flags.add_methods(p, (2, 3, 4, 6, 8), "gptq")
    flags.add_limits(p)
    flags.add_runtime(p, "only plans that this runtime can load, such as vllm or gptq")
    p.add_argument(
        "--trials",
        type=values.few_plans,
        default=10,
        metavar="N",
        help="how many plans are run at most before the verification, full precision included (default: 10)",
    )
    p.add_argument(
        "--minutes",
        type=values.minutes,
        metavar="M",
        help="no further plan is begun after so many minutes; the verification comes on top (default: no limit)",
    )
    p.add_argument(
        "--top",
        type=values.top,
        metavar="K",
        help="how many plans are verified per budget (default: 3 for one budget, 2 for each of several)",
    )
    flags.add_study_folder(p)
    flags.add_samples(p)
    flags.add_calibration(p)
    flags.add_device(p)
    p.add_argument("--dry-run", action="store_true", help="predict time, disk and memory; no weights are loaded")
    p.set_defaults(include=(), whole_answers=False)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Score, measure, verify and store a plan for each budget; or forecast that with --dry-run."""
    began = time.monotonic()
    requested = _checked(args)
    from sensitivity.api.plan_notices import (
        warn_if_calibrated_elsewhere,
        warn_if_calibration_is_easier,
        warn_if_scores_misjudge,
    )
    from sensitivity.api.planning import begin_plan, meetable, opening_scores, search_examples
    from sensitivity.api.saved_recommendations import check_may_save
    from sensitivity.api.scoring import scored
    from sensitivity.api.sweeping import check_same_study
    from sensitivity.measure.generate.batches import check_tasks_fit

    vlm, parts, tasks = loaded(args)
    n = search_examples(args.n, tasks)
    check_same_study(args.out, args.task, n, args.seed)
    requested, request = _request(args, parts, requested)
    request, unmet = meetable(parts, requested, request)
    check_may_save(args.out, request.bpw)
    check_tasks_fit(vlm, tasks)
    if args.dry_run:
        return _whole(_forecast(args, vlm, parts, requested, tasks, request), unmet)
    data = args.calibration or args.task
    with show_stages(args.json):
        scoring = scored(
            vlm, parts, requested, data, opening_scores(tasks, parts, requested), args.calibration_n, args.seed, tasks,
            args.cache_gb,
        )  # fmt: skip
    left = math.inf if args.minutes is None else max(60 * args.minutes - (time.monotonic() - began), 0.001)
    planning = begin_plan(
        vlm, parts, args.task, args.out, request, scoring.scores, args.trials,
        n=n, seed=args.seed, statistics=scoring.given.statistics,
        until=() if args.minutes is None else (f"{left:.3f}s",),
    )  # fmt: skip
    if args.json:
        show_progress_in_json(planning.steps, planning.study, args.trials, left)
    else:
        show_progress(planning.steps, "measuring", planning.study, args.trials, left)
    warn_if_calibration_is_easier(scoring.given, planning.study)
    warn_if_scores_misjudge(planning.study, planning.request, args.trials)
    warn_if_calibrated_elsewhere(data, args.task, args.trials)
    return _whole(_verified(args, vlm, scoring, planning.study, planning.request, planning.proposals()), unmet)


def _whole(result: dict[str, object], unmet: list[str]) -> dict[str, object]:
    """The result; where some budgets cannot be met, an error that says so and holds it."""
    if unmet:
        raise Partly("; ".join(unmet), result)
    return result


def _checked(args: argparse.Namespace) -> list[Scheme]:
    """The schemes, after every check that needs no model."""
    from sensitivity.api.one_calibration import check_calibration
    from sensitivity.api.planning import check_float_path
    from sensitivity.study.storage.location import check_begins, check_stores

    check_begins(args.out)
    if not args.dry_run:
        check_stores(args.out, verifies=True)
    check_budget_flags(args)
    requested, _ = checked(args, "random")
    check_float_path(requested, args.path)
    data = args.calibration or args.task
    check_calibration(args.out, requested, data, args.calibration_n, args.seed, verifies=True)
    return requested


def _request(
    args: argparse.Namespace, parts: ComponentMap, requested: list[Scheme]
) -> tuple[list[Scheme], PlanRequest]:
    """The schemes that the runtime can load, and the request.

    The request names tasks as they were typed; `begin_plan` replaces these by the names that the study gives them.
    """
    from sensitivity.analysis.recommending.request import PlanRequest
    from sensitivity.api.planning import allowed_and_tied, plans_to_verify

    bpw, allow = budgets_in_bpw(args, parts), dict(flags.distinct("--allow", args.allow))
    top = args.top or plans_to_verify(bpw)
    request = PlanRequest(bpw, dict.fromkeys(args.task, 1.0), {}, allow, args.tie, args.runtime, top)
    return loadable_schemes(args, parts, requested, allowed_and_tied(parts, request)[0]), request


def _verified(
    args: argparse.Namespace, vlm: VLM, scoring: Scored, study: Study, request: PlanRequest, proposals: Proposed
) -> dict[str, object]:
    """Run the best plans of each budget on fresh examples; store, print and return what is recommended."""
    from sensitivity.api.recommending import begin_recommendation
    from sensitivity.api.saved_recommendations import save_with_cards
    from sensitivity.study.counting import count
    from sensitivity.study.storage.paths import card_file

    recommendations, steps = begin_recommendation(
        study, request, vlm, proposals, n=args.n, statistics=scoring.given.statistics
    )
    show_progress_in_json(steps) if args.json else show_progress(steps, "verifying")
    best = recommendations()
    files = save_with_cards(study, best)
    measured = len(study.trials())
    if not args.json:
        print_score_costs(scoring.scores)
        print(f"{count(measured, 'plan')} {'was' if measured == 1 else 'were'} measured in {args.out}")
        for one, file in zip(best, files, strict=True):
            print_recommendation(one)
            print(f"  plan: {file}; its model card: {card_file(file)}")
    facts = [{**one.to_json(), "path": str(file)} for one, file in zip(best, files, strict=True)]
    costs = {one.name: {"cpu_seconds": one.seconds} for one in scoring.scores}
    return facts[0] | {"study": str(args.out), "plans_measured": measured, "scores": costs, "budgets": facts}


def _forecast(
    args: argparse.Namespace,
    vlm: VLM,
    parts: ComponentMap,
    requested: list[Scheme],
    tasks: list[Task],
    request: PlanRequest,
) -> dict[str, object]:
    """Forecast the cost of scoring and of all plans that may be run; random plans stand in for them."""
    from sensitivity.analysis.search.plan_lists import plans
    from sensitivity.api.planning import goes_on, opening_scores, search_examples, was_found
    from sensitivity.api.scoring import scores_are_kept
    from sensitivity.api.sweeping import keys_of_measured
    from sensitivity.measure.forecast.forecast import forecast_sweep
    from sensitivity.study.storage.paths import verification_folder

    n, found, fresh = search_examples(args.n, tasks), was_found(args.out, request), verification_folder(args.out)
    # full precision, and for each budget its candidates and the best uniform plan, of which some may be the same
    verified = len(keys_of_measured(fresh))
    most = verified if found else 1 + (request.top + 1) * len(request.bpw)
    measured = len(keys_of_measured(args.out))
    # plans run before the verification see fewer examples: count them as fewer plans with all examples
    trials = measured if found and not goes_on(args.out, request, args.trials) else max(args.trials, measured)
    searched, left = (-(-count * n // args.n) for count in (trials, trials - measured))
    done = searched - left + min(verified, most)
    listed = plans(parts, requested, "random", searched + most, args.seed)
    assert isinstance(listed, list)
    options = {"device": args.device, "dtype": args.dtype, "calibration": args.calibration_n, "cache_gb": args.cache_gb}
    names = opening_scores(tasks, parts, requested)
    data = args.calibration or args.task
    kept = args.out, parts, requested, data, names, args.calibration_n, args.seed, args.cache_gb, args.device
    predicted = forecast_sweep(
        vlm, parts, listed, tasks, **options, scores=() if scores_are_kept(*kept) else names,
        measured=[plan.key for plan in listed[:done]],
    )  # fmt: skip
    if not args.json:
        if found:
            more = "plans run only where others now promise a gain" if left else "no plan is left to run"
            print(f"what was asked is found and verified already; {more}")
        print_forecast(predicted)
    return predicted.to_json() | {"found": found}
