"""sensitivity rank: computes how much of the score each component decides."""

from __future__ import annotations

import argparse

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.tables import print_ranking

ABOUT = "say how much of the score each component decides, with intervals"
EXAMPLE = "sensitivity rank runs/first"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    flags.add_task(p)
    p.add_argument(
        "--method", type=values.name, metavar="METHOD", help="only plans of this method, where a study holds several"
    )
    p.add_argument("--by", type=values.name, metavar="GRANULARITY", help="rank coarser components than the study's")
    p.add_argument(
        "--near",
        type=values.fraction,
        metavar="SHARE",
        help="only trials that reach this share of full precision's score, such as 0.9",
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
    return {task: one.to_json() for task, one in rankings.items()}
