"""sensitivity failures: shows which answers a plan changes, and what the changes cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.tables import answer_counts, table
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from sensitivity.analysis.failures.changes import Change, Given
    from sensitivity.spec.plan import Plan
    from sensitivity.study.study import Study

ABOUT = "show which answers a plan changes against full precision, those that cost most first"
EXAMPLE = "sensitivity failures runs/first --out failures.html"
CELL = 60  # characters of a text in a table


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.study(p)
    p.add_argument(
        "--plan",
        type=values.name,
        metavar="KEY",
        help="a plan's key, or its beginning (default: the recommended one, or else the smallest on the frontier)",
    )
    p.add_argument("--task", type=values.name, metavar="T", help="only examples of this task")
    p.add_argument("--kind", type=values.name, metavar="K", help="only questions of this kind")
    p.add_argument("--n", type=values.on_a_page, default=20, help="examples to show (default: 20)")
    p.add_argument("--out", type=values.file, metavar="failures.html", help="write a page with the images, too")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Print the changes, and write them as a page with --out."""
    from sensitivity.analysis.failures.changes import study_of
    from sensitivity.analysis.failures.gallery import gallery
    from sensitivity.analysis.failures.pictures import Pictures
    from sensitivity.analysis.report import failures_page
    from sensitivity.study.study import Study

    if args.out is not None:
        failures_page.check(args.out)
    study = Study(args.study)
    plan = _plan(study, args.plan)
    where = study_of(study, plan)
    pictures = None if args.out is None else Pictures(where.meta)
    failures = gallery("What breaks first", where, plan, pictures, args.n, args.task or "", args.kind or "")
    if args.out is not None:
        failures_page.write(args.out, study.parts.model, [failures])
    if not args.json:
        answer_counts({f"{plan.key[:8]} {plan.describe()}": failures.counts})
        _show([card.change for card in failures.cards], failures.changed)
        if args.out is not None:
            print(f"page: {args.out}")
    return {
        "study": str(where.path),
        "key": plan.key,
        "plan": plan.describe(),
        "base": failures.base,
        "answers": list(failures.counts),
        "changed": failures.changed,
        "examples": [card.change.to_json() for card in failures.cards],
        "notes": list(failures.notes),
        "page": None if args.out is None else str(args.out),
    }


def _plan(study: Study, key: str | None) -> Plan:
    """The plan of a key, or the recommended one, or the smallest on the frontier: what breaks at its low end."""
    from sensitivity.analysis.allocate.kept_recommendation import recommended
    from sensitivity.study.racing import frontier_trials

    if key is not None:
        for one in recommended(study):  # it may have been run on fresh examples alone
            if one.plan.key.startswith(key):
                return one.plan
        return study.plan_named(key)
    if recommendations := recommended(study):
        return recommendations[0].plan
    best = [trial.plan for trial in frontier_trials(study.measured(), study.tasks[0]) if not trial.plan.is_native]
    if not best:
        raise UserError(f"{study.path} has no quantized plan on its frontier; name one by its key: --plan KEY")
    return best[0]


def _show(changes: list[Change], changed: int) -> None:
    """Print a row for each change."""
    if not changes:
        print("\nNo answer changed.")
        return
    table(
        f"Changed answers: {len(changes)} of {changed}, those that cost most first",
        ("cost", "task", "kind", "question", "right", "full precision", "this plan"),
        [
            (
                f"{one.cost:.3g}",
                one.task,
                one.kind,
                _cell(one.question.prompt if one.question else "?"),
                _cell(" | ".join(one.question.answers[:2]) if one.question else "?"),
                _given(one.before),
                _given(one.after),
            )
            for one in changes
        ],
    )


def _given(given: Given) -> str:
    sure = "" if given.sure is None else f" ({given.sure:.0%} sure of the right one)"
    return f"{_cell(given.answer) or '(empty)'}{sure}"


def _cell(text: str) -> str:
    from sensitivity.spec.errors import printable

    flat = printable(text)
    return flat if len(flat) <= CELL else f"{flat[:CELL]}…"
