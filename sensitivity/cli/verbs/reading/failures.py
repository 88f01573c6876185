"""sensitivity failures: shows which answers a plan changes, and what the changes cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.output.progress import show_progress
from sensitivity.cli.output.tables import print_answer_counts, print_table
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEY_LENGTH

if TYPE_CHECKING:
    from sensitivity.analysis.failures.changes import Change, GivenAnswer
    from sensitivity.analysis.failures.gallery import FailureGallery
    from sensitivity.spec.plan import Plan
    from sensitivity.study.study import Study

ABOUT = "show which answers a plan changes against full precision, those that cost most first"
EXAMPLE = "sensitivity failures runs/first --out failures.html"
CELL = 60  # characters of a text in a table


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    p.add_argument(
        "--plan",
        type=values.name,
        metavar="KEY",
        help="a plan's number, or how its key begins (default: the recommended one, or else the smallest on the"
        " frontier)",
    )
    p.add_argument("--task", type=values.name, metavar="T", help="only examples of this task")
    p.add_argument("--kind", type=values.name, metavar="K", help="only questions of this kind")
    p.add_argument(
        "--part",
        type=values.name,
        metavar="NAME",
        help="only answers for which this component is the cheapest one that mends them when it alone is put back to"
        " full precision; or 'no single part'",
    )
    p.add_argument("--n", type=values.on_a_page, default=20, help="examples to show (default: 20)")
    p.add_argument("--out", type=path_values.file, metavar="failures.html", help="write a page with the images, too")
    p.add_argument(
        "--causes",
        action="store_true",
        help="run the model on the first --n answers that got worse, with one component after the other put back to"
        " full precision, to measure which one mends each; what was measured is kept",
    )
    flags.add_moved_model(p)
    flags.add_device(p)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Print the changes, and write them as a page with --out."""
    from sensitivity.analysis.failures.changes import on_examples_of, study_of
    from sensitivity.analysis.failures.gallery import gallery_of
    from sensitivity.analysis.failures.pictures import Pictures
    from sensitivity.analysis.reporting import failures_page
    from sensitivity.study.study import Study

    if not args.causes:
        flags.without_effect(args, ["--model", "--device", "--dtype"], "without --causes, which runs the model")
    if args.out is not None:
        failures_page.check(args.out)
    study = Study(args.study)
    plan = _plan(study, args.plan)
    measured_in, task, kind = study_of(study, plan), args.task or "", args.kind or ""
    if args.causes:
        _measure_causes(args, measured_in, plan)
    pictures = None if args.out is None else Pictures(measured_in.meta)
    where = on_examples_of(study, measured_in)
    failures = gallery_of(
        f"What breaks first, {where}", measured_in, plan, pictures, args.n, task, kind, args.part or "", study.path
    )
    if args.out is not None:
        failures_page.write(args.out, study.parts.model, [failures])
    if not args.json:
        print_answer_counts({f"{plan.key[:KEY_LENGTH]} {plan.describe()}, {where}": failures.counts})
        _show(failures)
        if args.out is not None:
            print(f"page: {args.out}")
    return {
        "study": str(measured_in.path),
        "key": plan.key,
        "plan": plan.describe(),
        "base": failures.base,
        "answers": list(failures.counts),
        "changed": failures.changed,
        "mended_by": dict(failures.causes),
        "not_measured": failures.unexplained,
        "examples": [card.change.to_json() | {"cause": card.cause and card.cause.to_json()} for card in failures.cards],
        "notes": list(failures.notes),
        "page": None if args.out is None else str(args.out),
    }


def _measure_causes(args: argparse.Namespace, study: Study, plan: Plan) -> None:
    """Run the model on the examples that got worse, unless it is known already which part mends them."""
    from sensitivity.analysis.failures.gallery import changed
    from sensitivity.api.finding_causes import begin_causes
    from sensitivity.models.loading import device_of, dtype_of, load
    from sensitivity.study.storage.location import check_stores
    from sensitivity.tasks.table import retrieval_among

    device_of(args.device)
    dtype_of(args.dtype)
    if "fingerprint" not in study.meta:
        raise UserError(f"{study.path} was imported from a table, and there is no model to run")
    ranked = retrieval_among(study.meta["tasks"])
    if ranked >= ({args.task} if args.task else set(study.tasks)):
        raise UserError("retrieval ranks each image among all others: no single one can be run to find a cause")
    check_stores(args.study)
    every = changed(study, plan, args.task or "", args.kind or "")
    failed = [one for one in every if one.cost > 0 and one.task not in ranked][: args.n]
    model = args.model or str(study.meta["model"])
    vlm = load(model, device=args.device, dtype=args.dtype or study.meta["dtype"])
    show_progress(begin_causes(vlm, study, plan, failed), "putting parts back")


def _plan(study: Study, wanted: str | None) -> Plan:
    """The plan that is named, or else the recommended one, or the smallest quantized one on the frontier."""
    from sensitivity.analysis.comparing.sides import plan_of
    from sensitivity.analysis.recommending.kept_recommendation import recommended
    from sensitivity.study.racing import frontier_trials

    if wanted is not None:
        return plan_of(study, wanted)[1]
    if recommendations := recommended(study):
        return recommendations[0].plan
    best = [trial.plan for trial in frontier_trials(study.measured(), study.tasks[0]) if not trial.plan.is_native]
    if not best:
        raise UserError(f"{study.path} has no quantized plan on its frontier; name one by its key: --plan KEY")
    return best[0]


def _show(failures: FailureGallery) -> None:
    """Print a row for each change, and how many answers each part mends."""
    from sensitivity.analysis.failures.causes import NO_PART
    from sensitivity.study.counting import count

    if not failures.cards:
        mended = "that no single part mends" if failures.part == NO_PART else f"to be mended by {failures.part}"
        print(f"\nNo answer is known {mended}." if failures.part else "\nNo answer changed.")
    else:
        _changes(failures)
    if failures.causes:
        counted = ", ".join(f"{part} {number}" for part, number in failures.causes)
        print(f"\nMended by the cheapest part that is enough, given back its bits alone: {counted}.")
    if failures.unexplained:
        how = f": `{failures.ask}` measures it" if failures.ask else ""
        print(f"The cause is not measured for {count(failures.unexplained, 'answer')} that got worse{how}.")


def _changes(failures: FailureGallery) -> None:
    """Print a row for each change."""
    mended = [card.cause.words if card.cause else "" for card in failures.cards]
    has_causes = any(mended)
    print_table(
        f"Changed answers: {len(failures.cards)} of {failures.changed}, those that cost most first",
        (
            "cost",
            "task",
            "kind",
            "example",
            "question",
            "right",
            "full precision",
            "this plan",
            *(["mended by"] if has_causes else []),
        ),
        [
            (
                f"{one.cost:.3g}",
                one.task,
                one.kind,
                _example(one),
                _cell(one.question.prompt if one.question else "?"),
                _cell(" | ".join(one.question.answers[:2]) if one.question else "?"),
                _given(one.before),
                _given(one.after),
                *([why] if has_causes else []),
            )
            for one, why in ((card.change, why) for card, why in zip(failures.cards, mended, strict=True))
        ],
    )


def _example(one: Change) -> str:
    """The id of an example, and the names of its images where they are files."""
    images = one.question.images if one.question else ()
    return ", ".join([one.example, *(file.name for file in images if file is not None)])


def _given(given: GivenAnswer) -> str:
    sure = "" if given.sure is None else f" ({100 * given.sure:.0f} % sure of the right one)"
    return f"{_cell(given.answer) or '(empty)'}{sure}"


def _cell(text: str) -> str:
    from sensitivity.spec.errors import printable

    flat = printable(text)
    return flat if len(flat) <= CELL else f"{flat[:CELL]}…"
