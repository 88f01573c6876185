"""The end of a sweep: its frontier, how exactly it is known, and what to type next."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.cli.output.progress import best_so_far, points
from sensitivity.cli.output.tables import print_frontier
from sensitivity.spec.errors import shell_word

if TYPE_CHECKING:
    from sensitivity.study.study import Study


def show_summary(args: argparse.Namespace, study: Study) -> dict[str, object]:
    """Print the state of the study, and return it."""
    from sensitivity.study.racing import uncertainty
    from sensitivity.study.stopping import Until
    from sensitivity.study.storage import expected

    goal = Until.parse(args.until).error
    trials, best = json.loads(study.table().to_json(orient="records")), points(study)
    kinds = [{"key": trial.key, **row} for trial in best_so_far(study) for row in study.counts_by_kind(trial.plan)]
    facts = {"study": str(args.out), **study.counts(), "frontier": best, "answers": kinds, "trials": trials}
    if (origin := expected.origin_of(study.path)) is not None:
        facts["expected_from"] = origin
    if goal:
        facts["error"] = known = uncertainty(study)
    if not args.json:
        print_frontier(study)
        if goal:
            missed = "; all examples were used, so a smaller error needs a larger --n in another --out"
            print(
                f"The differences of frontier plans to full precision are known to within {known:.4f}; --until asked "
                f"for {goal:.4f}"
                f"{missed if known >= goal and not facts['waiting'] else ''}"
            )
        if note := expected.note_on(study.path):
            print(f"{note[:1].upper()}{note[1:]}.")
        legal = f" --runtime {args.runtime}" if args.runtime else ""
        recommend = f"sensitivity recommend {shell_word(args.out)} --bpw {_budget(study):g}{legal}"
        print(f"{_progress_words(facts, args.out)}; next: {recommend}")
    return facts


def _budget(study: Study) -> float:
    """The budget that is suggested: 4 bits per weight, or more where every measured plan is larger."""
    smallest = min((trial.bpw for trial in study.measured()), default=4.0)
    return max(4.0, math.ceil(2 * smallest) / 2)


def _progress_words(counts: Mapping[str, object], out: Path) -> str:
    """How many plans are done, waiting and running, in words."""
    plans, have = ("plan", "has") if counts["done"] == 1 else ("plans", "have")
    words = [f"{counts['done']} {plans} in {out} {have} seen all examples"]
    if counts["waiting"]:
        words.append(f"{counts['waiting']} more have not (the same command without --until goes on)")
    if counts["running"]:
        words.append(f"{counts['running']} more are running in another process")
    return ", ".join(words)
