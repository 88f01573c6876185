"""sensitivity recommend: chooses the best plan for a budget, and verifies it by running it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.progress import show_progress
from sensitivity.cli.output.tables import answer_counts, recommendation

if TYPE_CHECKING:
    from sensitivity.analysis.allocate.recommendation import Recommendation
    from sensitivity.study.study import Study

ABOUT = "choose the best plan for a budget, and verify it by running it"
EXAMPLE = "sensitivity recommend runs/first --bpw 4.0"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.study(p)
    flags.budgets(p)
    flags.task(p)
    flags.pairs(
        p,
        "--weight",
        values.importance,
        "TASK=W",
        "instead of --task: how much each of several tasks counts, such as vqa=2",
    )
    flags.pairs(
        p, "--floor", values.floor, "TASK=SHARE", "keep a task at this share of full precision, such as ground=0.95"
    )
    flags.limits(p)
    flags.runtime(p, "only plans that this runtime can load, such as compressed-tensors")
    p.add_argument(
        "--top", type=values.top, default=3, metavar="K", help="how many plans are run per budget (default: 3)"
    )
    p.add_argument("--no-run", action="store_true", help="predict only; the model is not loaded")
    flags.moved_model(p)
    flags.device(p)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Choose a plan for each budget, measure it, and store it in the study."""
    from sensitivity.analysis.allocate.kept_recommendation import check_request, save
    from sensitivity.analysis.allocate.request import PlanRequest
    from sensitivity.analysis.observations import observations_of
    from sensitivity.api.recommending import begin_recommendation
    from sensitivity.models.loading import device_of, dtype_of, load
    from sensitivity.spec.errors import UserError
    from sensitivity.spec.runtimes.table import files_of
    from sensitivity.spec.sizes import bpw_in_gb, header_bytes
    from sensitivity.study.study import Study

    if args.gb is not None:
        flags.without_effect(args, ["--bpw"], "beside --gb, as there is one kind of budget")
    if args.no_run:
        flags.without_effect(args, ["--top", "--model", "--device", "--dtype"], "with --no-run")
    device_of(args.device)
    dtype_of(args.dtype)
    study = Study(args.study)
    if args.task and args.weight:
        raise UserError("either --task names the one task that decides, or --weight says how much each counts")
    headers = header_bytes(study.parts) if files_of(args.runtime) else 0  # GB count headers of files too, bpw does not
    bpw = args.bpw if args.gb is None else tuple(bpw_in_gb(study.parts, gb, headers) for gb in args.gb)
    weights = dict(flags.distinct("--weight", args.weight)) or {args.task or study.tasks[0]: 1.0}
    floors, allow = dict(flags.distinct("--floor", args.floor)), dict(flags.distinct("--allow", args.allow))
    request = PlanRequest(bpw, weights, floors, allow, args.tie, args.runtime, args.top)
    check_request(study, request)
    if "fingerprint" not in study.meta:
        flags.without_effect(
            args, ["--model", "--device", "--dtype"], "for an imported table, which has no model to run"
        )
    model = args.model or study.meta.get("model")
    vlm = None
    if not args.no_run and "fingerprint" in study.meta:
        vlm = load(str(model), device=args.device, dtype=args.dtype or study.meta["dtype"])
    recommendations, steps = begin_recommendation(study, request, vlm)
    if vlm is not None:
        show_progress(steps, "verifying")
    best = recommendations()
    paths = save(study, best)
    notes = dict.fromkeys(note for task in weights for note in observations_of(study, task).notes)
    if not args.json:
        for note in notes:
            print(f"note: {note}")
        for one, path in zip(best, paths, strict=True):
            recommendation(one)
            print(f"  plan: {path}")
        answer_counts({f"{one.plan.key[:8]} {one.plan.describe()}": _counts(study, one) for one in best})
    facts = [
        {**one.to_json(), "path": str(path), "answers": _counts(study, one)}
        for one, path in zip(best, paths, strict=True)
    ]
    return facts[0] | {"notes": list(notes)} | ({"budgets": facts} if len(facts) > 1 else {})


def _counts(study: Study, one: Recommendation) -> list[dict[str, object]]:
    """What happened to the answers of a recommended plan; nothing where it was not run."""
    from sensitivity.analysis.failures.changes import study_of
    from sensitivity.spec.errors import UserError

    try:
        return study_of(study, one.plan).counts_by_kind(one.plan)
    except UserError:
        return []
