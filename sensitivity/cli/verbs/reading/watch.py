"""sensitivity watch: shows the state of a sweep that runs in other processes, until it is over."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
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
    """Look at the study again and again, until nothing waits or runs, or what ran it has ended."""
    from sensitivity.study.study import Study

    study = Study(args.study)
    if not (args.once or args.json):
        _follow(study, args.every)
    counts = _counts(study)
    if not args.json:
        print(_words(counts))
        if study.measured():
            print_frontier(study)
    return {"study": str(args.study), **counts, "frontier": points(study)}


def _follow(study: Study, every: int) -> None:
    """Show the counts and the frontier in place; without a terminal, print a line when the counts have changed."""
    if not sys.stderr.isatty():
        last: dict[str, int] = {}
        for counts in _looks(study, every):
            if counts != last:
                print(_words(counts), file=sys.stderr, flush=True)
            last = counts
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        for counts in _looks(study, every):
            text = "\n".join([_words(counts), *(f"  {line}" for line in frontier_lines(study))])
            live.update(Text(text), refresh=True)


def _looks(study: Study, every: int) -> Iterator[dict[str, int]]:
    """The counts, again and again while the sweep goes on.

    It has ended where all that ran has lost its process. A single look may fall between two plans of another process.
    """
    last = None
    while (counts := _counts(study))["waiting"] or counts["running"] or counts["stopped"]:
        if counts["stopped"] and not counts["running"] and counts == last:
            return
        yield counts
        last = counts
        time.sleep(every)


def _counts(study: Study) -> dict[str, int]:
    """The counts of plans; those whose process has ended do not count as running."""
    counts, stopped = study.counts(), study.stopped()
    return {**counts, "running": counts["running"] - stopped, "stopped": stopped}


def _words(counts: dict[str, int]) -> str:
    words = f"{counts['done']:,} plans done, {counts['running']:,} running, {counts['waiting']:,} waiting"
    stopped = f", {counts['stopped']:,} stopped as their process ended: the same sweep again goes on with them"
    return words + (stopped if counts["stopped"] else "")
