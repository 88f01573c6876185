"""sensitivity rank: computes how much of the score each component decides."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.tables import print_ranking

if TYPE_CHECKING:
    from sensitivity.analysis.importance.types import Ranking
    from sensitivity.study.study import Study

ABOUT = "say how much of the score each component decides, with intervals"
EXAMPLE = "sensitivity rank runs/first"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    flags.add_task(p, "rank by this task alone (default: by each of the study's tasks)")
    p.add_argument(
        "--method", type=values.name, metavar="METHOD", help="only plans of this method, where a study holds several"
    )
    p.add_argument("--by", type=values.name, metavar="GRANULARITY", help="rank coarser components than the study's")
    p.add_argument(
        "--near",
        type=values.fraction,
        metavar="SHARE",
        help="only trials that are predicted to reach this share of full precision's score, such as 0.9, by a forest"
        " that has not seen them: measured scores alone would keep the lucky ones",
    )
    p.add_argument(
        "--bootstraps", type=values.resamples, default=100, help="resamples behind the intervals (default: 100)"
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Rank the components for each task."""
    from sensitivity.analysis.importance.ranking import rank
    from sensitivity.study.study import Study

    study = Study(args.study)
    rankings = {
        task: rank(study, task, by=args.by, method=args.method, near=args.near, bootstraps=args.bootstraps)
        for task in ([args.task] if args.task else study.tasks)
    }
    if not args.json:
        for one in rankings.values():
            print_ranking(one)
            if advice := _near_full_precision(args, study, one):
                print(f"  note: {advice}")
    return {task: one.to_json() for task, one in rankings.items()}


def _near_full_precision(args: argparse.Namespace, study: Study, one: Ranking) -> str:
    """Where a single level decides a ranking of all plans: the command that ranks those that one would use."""
    from sensitivity.analysis.importance import robustness
    from sensitivity.analysis.observations import observations_of
    from sensitivity.spec.errors import UserError, shell_word

    if args.near or robustness.decisive_level(one.levels) is None:
        return ""
    try:
        robustness.near_operating_point(observations_of(study, one.task, args.method), robustness.NEAR)
    except UserError:
        return ""  # too few plans are near full precision
    task = one.task if len(study.tasks) > 1 else None
    given = {"--task": task, "--by": args.by, "--method": args.method, "--near": robustness.NEAR}
    typed = " ".join(f"{flag} {shell_word(value)}" for flag, value in given.items() if value)
    return f"`sensitivity rank {shell_word(study.path)} {typed}` says which parts matter near full precision"
