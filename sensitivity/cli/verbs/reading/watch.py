"""sensitivity watch: shows the state of a sweep that runs in other processes, until it is over."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.progress import frontier_lines, points
from sensitivity.cli.output.tables import print_frontier

if TYPE_CHECKING:
    from sensitivity.study.study import Study

ABOUT = "show the state of a sweep in other processes until it is over; stopping this does not stop the sweep"
EXAMPLE = "sensitivity watch runs/first"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    p.add_argument("--every", type=values.pause, default=5, metavar="S", help="seconds between updates (default: 5)")
    p.add_argument("--once", action="store_true", help="print the state once and end; so does --json")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Look at the study again and again, until nothing waits or runs."""
    from sensitivity.study.study import Study

    study = Study(args.study)
    if not (args.once or args.json):
        _follow(study, args.every)
    counts = study.counts()
    if not args.json:
        print(_words(counts))
        if study.measured():
            print_frontier(study)
    return {"study": str(args.study), **counts, "frontier": points(study)}


def _follow(study: Study, every: int) -> None:
    """Show the counts and the frontier in place; without a terminal, print a line when the counts have changed."""
    if not sys.stderr.isatty():
        last: dict[str, int] = {}
        while _is_open(counts := study.counts()):
            if counts != last:
                print(_words(counts), file=sys.stderr, flush=True)
            last = counts
            time.sleep(every)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while _is_open(counts := study.counts()):
            text = "\n".join([_words(counts), *(f"  {line}" for line in frontier_lines(study))])
            live.update(Text(text), refresh=True)
            time.sleep(every)


def _is_open(counts: dict[str, int]) -> bool:
    return bool(counts["waiting"] or counts["running"])


def _words(counts: dict[str, int]) -> str:
    return f"{counts['done']:,} plans done, {counts['running']:,} running, {counts['waiting']:,} waiting"
