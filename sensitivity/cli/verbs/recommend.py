"""sensitivity recommend: chooses the best plan for a budget, and verifies it by running it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.arguments.budgets import budgets_in_bpw, check_budget_flags
from sensitivity.cli.output.progress import show_progress, show_progress_in_json, show_stages
from sensitivity.cli.output.tables import print_answer_counts, print_recommendation, print_runtime_costs
from sensitivity.spec.errors import Notice, Partly, UserError
from sensitivity.spec.plan import KEY_LENGTH

if TYPE_CHECKING:
    from sensitivity.analysis.recommending.kept_recommendation import Proposed
    from sensitivity.analysis.recommending.recommendation import Recommendation
    from sensitivity.analysis.recommending.request import PlanRequest
    from sensitivity.api.in_runtime import InRuntime
    from sensitivity.models.vlm import VLM
    from sensitivity.spec.runtimes.layer_times import LayerTimes
    from sensitivity.study.study import Study

ABOUT = "choose the best plan for a budget, and verify it by running it"
EXAMPLE = "sensitivity recommend runs/first --bpw 4.0"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    flags.add_budgets(p)
    flags.add_task(p)
    flags.add_pairs(
        p,
        "--weight",
        values.task_weight,
        "TASK=W",
        "instead of --task: how much each of several tasks counts, such as --weight vqa=2 --weight caption=1",
    )
    flags.add_pairs(
        p, "--floor", values.floor, "TASK=SHARE", "keep a task at this share of full precision, such as ground=0.95"
    )
    flags.add_prior(p)
    flags.add_limits(p)
    flags.add_runtime(p, "only plans that this runtime can load, such as compressed-tensors")
    g = p.add_argument_group(
        "limits in the runtime",
        "predicted from what `profile` measured on this machine; alone, or beside --bpw or --gb",
    )
    g.add_argument("--ms-per-token", type=values.milliseconds, metavar="X", help="for one new token, at most")
    g.add_argument(
        "--ms-per-answer", type=values.milliseconds, metavar="X", help="for image, prompt and answer, at most"
    )
    g.add_argument("--gb-resident", type=values.size, metavar="X", help="in memory, in GB (10^9 bytes), at most")
    p.add_argument(
        "--top", type=values.top, default=3, metavar="K", help="how many plans are run per budget (default: 3)"
    )
    p.add_argument("--no-run", action="store_true", help="predict only; the model is not loaded")
    flags.add_moved_model(p)
    flags.add_device(p)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Choose a plan for each budget, measure it, and store it in the study."""
    from sensitivity.analysis.atlas.priors import check_priors, expect_from, schemes_of
    from sensitivity.analysis.observations import observations_of
    from sensitivity.analysis.recommending.kept_recommendation import check_request
    from sensitivity.api.recommending import begin_recommendation
    from sensitivity.api.saved_recommendations import check_may_save
    from sensitivity.formats.timing.kept_times import kept_times_if_any, load_kept_times
    from sensitivity.models.loading import device_of, dtype_of
    from sensitivity.spec.limits import warn_of_idle_widths
    from sensitivity.study.storage import expected, layer_times
    from sensitivity.study.storage.location import check_stores
    from sensitivity.study.study import Study

    if args.no_run:
        flags.without_effect(args, ["--top", "--model", "--device", "--dtype"], "with --no-run")
    device_of(args.device)
    dtype_of(args.dtype)
    study = Study(args.study)
    request = _request(args, study)
    check_request(study, request)
    warn_of_idle_widths(request.allow, schemes_of(study), "the widths that were measured are")
    check_stores(study.path, verifies=not args.no_run)
    check_may_save(study.path, request.bpw)
    of = study.parts, args.runtime, args.threads or 0
    times = load_kept_times(*of) if request.limits else kept_times_if_any(*of)
    if args.prior:
        check_priors(args.prior, study.path)
        expect_from(study, args.prior, schemes_of(study))
    request, proposals, unmet = _proposed(study, request, times)
    vlm = _model(args, study)
    recommendations, steps = begin_recommendation(study, request, vlm, proposals, times)
    if vlm is not None:
        show_progress_in_json(steps) if args.json else show_progress(steps, "verifying")
    best = recommendations()
    if times is not None:
        layer_times.save(study.path, times)
    best, places = _saved(study, best)
    ran = [_in_runtime(args, study, one, vlm, times, request) for one in best]
    notes = dict.fromkeys(note for task in request.weights for note in observations_of(study, task).notes)
    if note := expected.note_on(study.path):
        notes[note] = None
    if not args.json:
        for note in notes:
            print(f"note: {note}")
        for one, path, outcome in zip(best, places, ran, strict=True):
            _show(study, one, path, times, request, outcome)
        print_answer_counts(
            {f"{one.plan.key[:KEY_LENGTH]}, for {one.budget:.4g} bpw": _counts(study, one) for one in best}
        )
    facts = [
        {**one.to_json(), "path": path and str(path), "answers": _counts(study, one)}
        | _run_time(study, one, times, outcome)
        for one, path, outcome in zip(best, places, ran, strict=True)
    ]
    result = facts[0] | {"notes": list(notes)} | ({"budgets": facts} if len(facts) > 1 or unmet else {})
    if unmet:
        raise Partly("; ".join(unmet), result)
    return result


def _proposed(study: Study, request: PlanRequest, times: LayerTimes | None) -> tuple[PlanRequest, Proposed, list[str]]:
    """The request for those budgets that can be met, what is proposed for them, and a sentence for each other one."""
    from sensitivity.analysis.allocate.budget import of_met
    from sensitivity.analysis.recommending.kept_recommendation import proposed

    try:
        return request, proposed(study, request, times), []
    except UserError:
        if len(request.bpw) == 1:
            raise
    met, unmet = of_met(request.bpw, lambda bpw: proposed(study, replace(request, bpw=(bpw,)), times)[0])
    return replace(request, bpw=tuple(met)), list(met.values()), unmet


def _saved(study: Study, best: Sequence[Recommendation]) -> tuple[list[Recommendation], list[Path | None]]:
    """Save what is recommended; the recommendations to show, and their files: None for one that is not stored.

    A plan that is only predicted never replaces the verified one of the same budget and request. Where both are the
    same plan, the verified one is shown.
    """
    from sensitivity.analysis.recommending.kept_recommendation import instead_of
    from sensitivity.api.saved_recommendations import save_with_cards

    kept = [instead_of(study, one) if one.measured is None else None for one in best]
    stored = [verified or one for verified, one in zip(kept, best, strict=True)]
    files = save_with_cards(study, stored)
    shown: list[Recommendation] = []
    places: list[Path | None] = []
    for one, verified, file in zip(best, kept, files, strict=True):
        same = verified is None or verified.plan == one.plan
        shown.append(verified if verified and same else one)
        places.append(file if same else None)
        if verified and same:
            message = f"{file} holds this plan for {one.budget:.4g} bpw with its verification, which is kept"
            warnings.warn(message, Notice, stacklevel=3)
        elif verified:
            message = (
                f"{file} keeps the plan for {one.budget:.4g} bpw that was verified ({verified.plan.describe()}); the "
                "one that is predicted to be best now is not stored: without --no-run, it is verified, too"
            )
            warnings.warn(message, Notice, stacklevel=3)
    return shown, places


def _model(args: argparse.Namespace, study: Study) -> VLM | None:
    """The study's model; None with --no-run, and for an imported table."""
    from sensitivity.models.loading import load
    from sensitivity.tasks.table import missing

    if "fingerprint" not in study.meta:
        flags.without_effect(
            args, ["--model", "--device", "--dtype"], "for an imported table, which has no model to run"
        )
        return None
    if args.no_run:
        return None
    if gone := missing(study.meta["tasks"]):
        raise UserError(
            f"plans cannot be run, since {gone} is not there, on which {study.path} was measured; put it there, or add "
            "--no-run, which predicts only"
        )
    return load(str(args.model or study.meta["model"]), device=args.device, dtype=args.dtype or study.meta["dtype"])


def _show(
    study: Study, one: Recommendation, path: Path | None, times: LayerTimes | None, request: PlanRequest,
    outcome: InRuntime | None,
) -> None:  # fmt: skip
    """Print a recommendation, its costs in the runtime, and its files, if it was stored."""
    print_recommendation(one)
    if times is not None and times.knows(study.parts, one.plan):
        print_runtime_costs(one.plan, study.parts, times, request.limits)
    if outcome is not None:
        print(f"  {outcome.words}")
    if path is not None:
        print(f"  plan: {path}; its model card: {path.with_suffix('.md')}")


def _request(args: argparse.Namespace, study: Study) -> PlanRequest:
    """The request that the flags make: budgets, tasks, floors and limits."""
    from sensitivity.analysis.recommending.request import PlanRequest
    from sensitivity.spec.plan import Plan
    from sensitivity.spec.runtimes.layer_times import LIMITED
    from sensitivity.spec.sizes import size

    check_budget_flags(args)
    if args.task and args.weight:
        raise UserError("either --task names the one task that decides, or --weight says how much each counts")
    bpw = budgets_in_bpw(args, study.parts)
    limits = {cost: getattr(args, cost) for cost in LIMITED if getattr(args, cost) is not None}
    # with limits alone, a plan may be as large as full precision
    if limits and args.gb is None and "bpw" not in getattr(args, "given", ()):
        bpw = (size(study.parts, Plan.uniform(study.parts, None)).bpw,)
    weights = dict(flags.distinct("--weight", args.weight)) or {args.task or study.tasks[0]: 1.0}
    if args.weight and (left := [task for task in study.tasks if task not in weights]):
        said = f"{' and '.join(left)} count{'s' if len(left) == 1 else ''} nothing: --weight names other tasks alone"
        warnings.warn(said, Notice, stacklevel=2)
    floors, allow = dict(flags.distinct("--floor", args.floor)), dict(flags.distinct("--allow", args.allow))
    return PlanRequest(bpw, weights, floors, allow, args.tie, args.runtime, args.top, limits)


def _in_runtime(
    args: argparse.Namespace, study: Study, one: Recommendation, vlm: VLM | None, times: LayerTimes | None,
    request: PlanRequest,
) -> InRuntime | None:  # fmt: skip
    """Run a recommended plan in its runtime, with its progress; None without limits, and where nothing is run."""
    from sensitivity.api.in_runtime import run_in_runtime

    if vlm is None or times is None or not request.limits:
        return None
    with show_stages(args.json):
        return run_in_runtime(study, one.plan, vlm, times, request.limits)


def _run_time(
    study: Study, one: Recommendation, times: LayerTimes | None, outcome: InRuntime | None
) -> dict[str, object]:
    """The predicted and the measured costs of a plan in its runtime; empty if its layers were not timed."""
    from sensitivity.spec.runtimes.layer_times import COSTS

    if times is None or not times.knows(study.parts, one.plan):
        return {}
    predicted = {cost: times.plan_cost(study.parts, one.plan, cost) for cost in COSTS}
    return {"run_time": predicted, "in_runtime": outcome and outcome.to_json()}


def _counts(study: Study, one: Recommendation) -> list[dict[str, object]]:
    """How many answers a recommended plan changed, left empty or cut off; empty if it was not run."""
    from sensitivity.analysis.failures.changes import study_of

    return study_of(study, one.plan).counts_by_kind(one.plan) if one.measured else []
