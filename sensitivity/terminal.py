"""What a person sees in the terminal: tables, a bar with the time left, the summary of a recommendation."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sensitivity.ticker import Ticker, clock

if TYPE_CHECKING:
    import pandas as pd
    from optuna.trial import FrozenTrial

    from sensitivity.importance import Ranking
    from sensitivity.preflight import Forecast
    from sensitivity.sweep import Step
    from sensitivity.trials import Study
    from sensitivity.verdict import Recommendation

WIDTH = 120  # where there is no terminal to ask


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns of numbers to the right, the last column as wide as it wants."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(*heads, box=None, pad_edge=False)
    for i, column in enumerate(grid.columns):
        column.justify = "right" if rows and all(str(row[i]).lstrip("+-")[:1].isdigit() for row in rows) else "left"
        column.overflow = "fold"
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print()
    console.print(escape(title), style="bold", soft_wrap=True, highlight=False)
    console.print(grid, highlight=False)


class Pace:
    """How long the rest will take, from what this run has done; what earlier runs did says nothing about it.

    `plans` is how many there will be, where they are not all known beforehand; after `seconds` it ends anyway.
    """

    def __init__(self, plans: int = 0, seconds: float = math.inf) -> None:
        self.plans, self.ends = plans, time.monotonic() + seconds
        self.earlier, self.began = 0, 0.0

    def after(self, step: Step) -> tuple[int, float]:
        """Images and seconds that are left."""
        now = time.monotonic()
        if not self.began:  # the clock begins where the first step did: loading is over
            self.earlier, self.began = step.done - step.new, now - step.seconds
        images = max(step.left, self.plans * step.images - step.done)
        seconds = (now - self.began) / (step.done - self.earlier) * images
        return images, max(min(seconds, self.ends - now), 0.0)


def walk(
    steps: Iterable[Step], title: str, study: Study | None = None, plans: int = 0, seconds: float = math.inf
) -> int:
    """Walk along a sweep behind a bar on standard error: what is done, the time left, and the frontier so far.

    Where that is no terminal there is a plain line every few seconds instead.
    """
    if not sys.stderr.isatty():
        return _walk_plainly(steps, title, Pace(plans, seconds))
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskProgressColumn
    from rich.text import Text

    finished, pace, began = 0, Pace(plans, seconds), time.monotonic()
    beside = "{task.fields[time]}", "{task.fields[last]}"
    bar = Progress("{task.description}", BarColumn(), TaskProgressColumn(), *beside)
    line = bar.add_task(title, total=None, time="", last="preparing")
    with Live(bar, console=Console(stderr=True), refresh_per_second=4) as live:
        shown = 0.0
        for step in steps:
            finished += 1
            images, rest = pace.after(step)
            done, left = step.done - pace.earlier, f"{clock(rest)} left"
            bar.update(line, total=done + images, completed=done, time=left, last=_last(step))
            if study is not None and time.monotonic() - shown > 1:
                live.update(Group(bar, *(Text(f"  {text}", style="dim") for text in standing(study))))
                shown = time.monotonic()
        if not finished:
            bar.update(line, total=1, completed=1, last="nothing was left to do")
        bar.update(line, time=f"in {clock(time.monotonic() - began)}")
        live.update(bar)
    return finished


def _walk_plainly(steps: Iterable[Step], title: str, pace: Pace) -> int:
    finished, began, told = 0, time.monotonic(), "preparing"
    ends = math.inf  # when all will be done, as far as is known; a step may take longer than from one line to the next

    def line() -> str:
        left = f"{clock(max(ends - time.monotonic(), 0))} left" if ends < math.inf else "time left not known yet"
        return f"{title}: {told}, {left}"

    with Ticker(line):
        for step in steps:
            finished += 1
            images, rest = pace.after(step)
            done, ends = step.done - pace.earlier, time.monotonic() + rest
            told = f"{done / max(done + images, 1):.0%}, {_last(step)}"
    end = f"100%, in {clock(time.monotonic() - began)}" if finished else "nothing was left to do"
    print(f"{title}: {end}", file=sys.stderr, flush=True)
    return finished


def walk_in_json(steps: Iterable[Step], study: Study, plans: int = 0, seconds: float = math.inf) -> int:
    """The same for machines: a line of JSON on standard error, at most one a second, and the last."""
    pace, shown, finished = Pace(plans, seconds), 0.0, 0
    unsaid: Callable[[], None] | None = None
    for step in steps:
        finished += 1
        unsaid = partial(_say, step, *pace.after(step), study)
        if time.monotonic() - shown > 1:
            unsaid()
            unsaid, shown = None, time.monotonic()
    if unsaid:
        unsaid()
    return finished


def _say(step: Step, images: int, seconds: float, study: Study) -> None:
    counts = study.counts(lately=True)
    facts = {
        "done": step.done,
        "left": images,
        "plans_done": counts["done"],
        "plans_left": counts["waiting"] + counts["running"],
        "seconds_left": round(seconds, 1),
        "plan": step.plan.describe(),
        "scores": dict(step.scores),
        "frontier": points(study),
    }
    print(json.dumps(facts), file=sys.stderr, flush=True)


def points(study: Study) -> list[dict[str, Any]]:
    """The frontier for machines."""
    return [_point(trial) for trial in best_so_far(study)]


def _last(step: Step) -> str:
    return " ".join(f"{task} {score:.3f}" for task, score in step.scores.items())


def best_so_far(study: Study) -> list[FrozenTrial]:
    from sensitivity.contenders import frontier

    return frontier(study.measured(), study.tasks[0])


def standing(study: Study, most: int = 8) -> list[str]:
    """The frontier as it stands, a line each: size, score with its interval, from how many examples."""
    lines = []
    for trial in best_so_far(study)[-most:]:
        point = _point(trial)
        score = point["scores"][study.tasks[0]]
        span = f"[{score['low']:.3f}, {score['high']:.3f}]"
        lines.append(f"{point['bpw']:5.2f} bpw  {score['mean']:.3f} {span} n {score['n']}  {point['plan']}")
    return lines


def _point(trial: FrozenTrial) -> dict[str, Any]:
    from sensitivity.plan import Plan

    attrs = trial.user_attrs
    shown = ("mean", "low", "high", "n")
    return {
        "bpw": round(attrs["size"]["bpw"], 4),
        "plan": Plan.from_json(attrs["plan"]).describe(),
        "scores": {task: {name: score[name] for name in shown} for task, score in attrs["scores"].items()},
    }


def frontier(study: Study, most: int = 12) -> None:
    """The plans that no smaller one beats on the first task."""
    rows = study.table().sort_values(["bpw", study.tasks[0]], ascending=[True, False])
    best = rows[rows[study.tasks[0]] > rows[study.tasks[0]].cummax().shift(fill_value=-1.0)].tail(most)
    table(
        f"Frontier: no smaller plan scores higher on {study.tasks[0]} (95 % intervals where they are known"
        f"{'' if rows['complete'].all() else '; n where not all examples were seen'})",
        ("bpw", *study.tasks, "plan"),
        [
            (f"{row['bpw']:.2f}", *(_interval(row, task) for task in study.tasks), row["plan"])
            for _, row in best.iterrows()
        ],
    )


def forecast(found: Forecast) -> None:
    rate = f"{found.flops / 1e9:,.0f} GFLOP/s in products of this model's shapes"
    count = f"{found.plans:,} plans, {found.examples:,} examples of {found.images:,} images"
    table(f"{count}; {rate}", ("what", "how much", "of which"), found.rows())


def ranking(found: Ranking) -> None:
    rows = []
    for name, row in found.table.iterrows():
        shares = [f"{row[column]:.1f}" for column in ("forest", "permutation", "shap") if column in row]
        span = f"{row['consensus']:.1f} [{row['consensus.low']:.1f}, {row['consensus.high']:.1f}]"
        rows.append((name, span, *shares))
    table(
        f"Importance for {found.task}, in per cent ({found.trials} trials; R2 of the forest {found.r2:.2f}, "
        f"of a line {found.linear_r2:.2f})",
        ("component", "consensus", "forest", "permutation", "SHAP"),
        rows,
    )
    for warning in found.warnings:
        print(f"  note: {warning}")


def recommendation(found: Recommendation) -> None:
    """The plan, what it weighs, what it scores beside full precision and the best uniform plan."""
    print()
    print(f"Best plan for {found.budget:.4g} bits per weight, judged by {found.task}:")
    print(f"  {found.plan.describe()}")
    size = found.size
    print(f"  {size.bpw:.2f} bpw {size.how} ({size.bpw_codes:.2f} codes only), {_megabytes(size.bytes)}")
    if found.measured is None:
        expected = found.predicted
        print(f"  predicted {found.task} {expected.score:.3f} [{expected.low:.3f}, {expected.high:.3f}]")
    else:
        where = "examples that had no part in the choice" if found.fresh else "the examples it was chosen on"
        print(f"  {found.task} {found.measured}, measured on {where}")
        if found.full is not None:
            print(f"  full precision {found.full}")
        if found.uniform is not None:
            print(f"  best uniform plan within the budget: {found.uniform.other.describe()}, {found.uniform.score}")
    print(f"  {found.words}")


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _interval(row: pd.Series, task: str) -> str:
    low, high = row.get(f"{task}.low"), row.get(f"{task}.high")
    if low is None or low != low:  # an imported table has means alone
        return f"{row[task]:.3f}"
    seen = "" if row["complete"] else f" (n {row[f'{task}.n']:.0f})"
    return f"{row[task]:.3f} [{low:.3f}, {high:.3f}]{seen}"
