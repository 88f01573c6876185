"""sensitivity watch: shows the state of a sweep that runs in other processes, until it is over."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.output.progress import frontier_lines, points
from sensitivity.cli.output.tables import print_frontier
from sensitivity.spec.errors import shell_word

if TYPE_CHECKING:
    from sensitivity.study.study import Study

ABOUT = "show the state of a sweep in other processes until it is over; stopping this does not stop the sweep"
EXAMPLE = "sensitivity watch runs/first"
BEGINNING = 0.5  # seconds between looks for a study that is not there yet
LOADING = 60.0  # seconds that plans may wait while no process is known: one that will run them may still be loading


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    p.add_argument("--every", type=values.pause, default=5, metavar="S", help="seconds between updates (default: 5)")
    p.add_argument(
        "--once",
        action="store_true",
        help="print the state once and end, as --json does; neither waits for a study that is not there yet",
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Look at the study again and again, until nothing waits or runs, or what ran it has ended."""
    from sensitivity.study.study import Study

    if not (args.once or args.json):
        _wait_for(args.study)
    study = Study(args.study)
    if not (args.once or args.json):
        _follow(study, args.every)
    counts = _counts(study)
    if not args.json:
        print(_words(counts) + (f"; {_how_to_go_on(study)}" if _is_over(study, counts) else ""))
        if study.measured():
            print_frontier(study)
    return {"study": str(args.study), **counts, "frontier": points(study)}


def _wait_for(path: Path) -> None:
    """Wait for the study of a process that still loads its model; not where none can be begun, beside other files."""
    from sensitivity.study.storage.paths import is_study, strangers

    if is_study(path) or path.is_file() or strangers(path):
        return
    print(f"no study at {path} yet: waiting until one is begun; Ctrl-C ends this", file=sys.stderr, flush=True)
    while not is_study(path):
        time.sleep(BEGINNING)
    time.sleep(BEGINNING)  # until its first lines are written, too


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

    It has ended where all that ran has lost its process. A single look may fall between two plans of another process;
    and where plans wait, a process that is about to run them may be loading its model.
    """
    last, since = None, time.monotonic()
    while (counts := _counts(study))["waiting"] or counts["running"] or counts["stopped"]:
        if counts != last or not (counts["stopped"] or study.is_deserted()):
            since = time.monotonic()
        elif not counts["running"] and (counts["stopped"] or time.monotonic() - since > LOADING):
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
    return words + (f", {counts['stopped']:,} stopped as their process ended" if counts["stopped"] else "")


def _is_over(study: Study, counts: dict[str, int]) -> bool:
    """Whether plans are left, and no process is known to run them."""
    return not counts["running"] and bool(counts["stopped"] or (counts["waiting"] and study.is_deserted()))


def _how_to_go_on(study: Study) -> str:
    """What to type where no process is known to run the plans that are left."""
    return (
        "no process is known to work on them; to go on, type the command that began it again, with "
        f"--out {shell_word(study.path)}"
    )
