"""Progress of a sweep: a bar with the time left, plain lines without a terminal, or lines of JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NotRequired, TypedDict

from sensitivity.cli.output.ticker import Ticker
from sensitivity.spec import stage
from sensitivity.spec.errors import Notice
from sensitivity.spec.stage import clock

if TYPE_CHECKING:
    from sensitivity.measure.loop import Step
    from sensitivity.study.study import Study
    from sensitivity.study.trial import Trial


class Pace:
    """Estimates the time left from the steps of this run; the speed of earlier runs is ignored.

    `plans` is the expected number of plans, for a search that has not chosen all of them yet; after `seconds` the run
    ends anyway.
    """

    def __init__(self, plans: int = 0, seconds: float = math.inf) -> None:
        self.plans, self.ends = plans, time.monotonic() + seconds
        self.earlier, self.began = 0, 0.0

    def after(self, step: Step) -> tuple[int, float]:
        """The images and the seconds that are left after a step."""
        now = time.monotonic()
        if not self.began:  # the clock starts at the beginning of the first step, to leave out loading
            self.earlier, self.began = step.done - step.new, now - step.seconds
        images = max(step.left, self.plans * step.images - step.done)
        seconds = (now - self.began) / (step.done - self.earlier) * images
        return images, max(min(seconds, self.ends - now), 0.0)


def show_progress(
    steps: Iterable[Step], title: str, study: Study | None = None, plans: int = 0, seconds: float = math.inf
) -> int:
    """Run a sweep behind a progress bar on standard error: what is done, the time left, and the frontier so far.

    Without a terminal, print a plain line every few seconds instead. Returns the number of steps.
    """
    steps = _with_notice(steps)
    if not sys.stderr.isatty():
        return _show_lines(steps, title, Pace(plans, seconds))
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn
    from rich.text import Text

    class Status(ProgressColumn):
        """The last scores; before the first, what runs now."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["last"] or stage.now() or "preparing")

    finished, pace, began = 0, Pace(plans, seconds), time.monotonic()
    percent = TaskProgressColumn("{task.percentage:>3.0f} %")
    bar = Progress("{task.description}", BarColumn(), percent, "{task.fields[time]}", Status())
    line = bar.add_task(title, total=None, time="", last="")
    with Live(bar, console=Console(stderr=True), refresh_per_second=4) as live:
        shown = 0.0
        for step in steps:
            finished += 1
            images, rest = pace.after(step)
            done, left = step.done - pace.earlier, f"{clock(rest)} left"
            bar.update(line, total=done + images, completed=done, time=left, last=_last(step))
            if study is not None and time.monotonic() - shown > 1:
                live.update(Group(bar, *(Text(f"  {text}", style="dim") for text in frontier_lines(study))))
                shown = time.monotonic()
        if not finished:
            bar.update(line, total=1, completed=1, last="nothing was left to do")
        bar.update(line, time=f"in {clock(time.monotonic() - began)}")
        live.update(bar)
    return finished


@contextlib.contextmanager
def show_stages(quiet: bool = False) -> Iterator[None]:
    """On a terminal, show a line that says what runs now; without a terminal, `working` prints it."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # transient: what is printed next takes the line's place
    with Live(console=Console(stderr=True), get_renderable=lambda: Text(stage.now(), style="dim"), transient=True):
        yield


def _show_lines(steps: Iterable[Step], title: str, pace: Pace) -> int:
    """The same as `show_progress` with plain lines, from a thread that prints even while a long step runs."""
    finished, began, state = 0, time.monotonic(), ""
    ends = math.inf  # the expected end of the run; a line printed during a long step counts down to it

    def line() -> str:
        left = f"{clock(max(ends - time.monotonic(), 0))} left" if ends < math.inf else "time left not known yet"
        return f"{title}: {state or stage.now() or 'preparing'}, {left}"

    with Ticker(line):
        for step in steps:
            finished += 1
            images, rest = pace.after(step)
            done, ends = step.done - pace.earlier, time.monotonic() + rest
            state = f"{100 * done / max(done + images, 1):.0f} %, {_last(step)}"
    end = f"100 %, in {clock(time.monotonic() - began)}" if finished else "nothing was left to do"
    print(f"{title}: {end}", file=sys.stderr, flush=True)
    return finished


def show_progress_in_json(
    steps: Iterable[Step], study: Study | None = None, plans: int = 0, seconds: float = math.inf
) -> int:
    """The same for programs: a line of JSON on standard error, at most one per second, and always the last.

    Without a study, as while plans are verified, it says nothing of a frontier.
    """
    pace, shown, finished = Pace(plans, seconds), 0.0, 0
    latest: partial[None] | None = None  # prints the latest step, which may be the last one
    printed = True
    for step in _with_notice(steps):
        finished += 1
        latest, printed = partial(_print_json, step, *pace.after(step), study, plans), False
        if time.monotonic() - shown > 1:
            latest()
            printed, shown = True, time.monotonic()
    if latest and (plans or not printed):  # a search may end before it has measured as many plans as it may
        latest(over=True)
    return finished


def _with_notice(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps, with a note as soon as full precision turns out to score nothing."""
    for step in steps:
        nothing = [task for task, mean in step.scores.items() if mean <= 0]
        if nothing and step.complete and step.plan.is_native:
            warnings.warn(
                f"full precision scores nothing on {' and '.join(nothing)}: plans have nothing to lose there, and "
                "cannot be compared; another --task or model would say more",
                Notice,
                stacklevel=2,
            )
        yield step


def _print_json(step: Step, images: int, seconds: float, study: Study | None, plans: int, over: bool = False) -> None:
    """Print one line of JSON. plans: how many a search may measure; once it is over, only what waits is left."""
    facts: dict[str, object] = {"done": step.done, "left": images}
    if study is not None:
        counts = study.counts(cached=True)
        queued = counts["waiting"] + counts["running"]
        if over and not queued:
            facts["left"] = seconds = 0
        left = queued if over else max(queued, plans - counts["done"])
        facts |= {"plans_done": counts["done"], "plans_left": left}
    facts |= {"seconds_left": round(seconds, 1), "plan": step.plan.describe(), "scores": dict(step.scores)}
    if study is not None:
        facts["frontier"] = points(study)
    print(json.dumps(facts), file=sys.stderr, flush=True)


class ScorePoint(TypedDict):
    """A mean score, its 95 % interval and the number of examples, or of the rows of an imported table."""

    mean: float
    low: float | None
    high: float | None
    n: int | None
    repetitions: NotRequired[int]


class ShownPlan(TypedDict):
    """A plan on the frontier."""

    bpw: float
    key: str
    plan: str
    scores: dict[str, ScorePoint]


def points(study: Study) -> list[ShownPlan]:
    """The frontier as JSON values."""
    return [_point(trial) for trial in best_so_far(study)]


def _last(step: Step) -> str:
    return " ".join(f"{task} {score:.3f}" for task, score in step.scores.items())


def best_so_far(study: Study) -> list[Trial]:
    """The trials on the frontier of the study's first task."""
    from sensitivity.study.racing import frontier_trials

    return frontier_trials(study.measured(), study.tasks[0])


def frontier_lines(study: Study, most: int = 8) -> list[str]:
    """The frontier so far, one line per plan: size, score with its interval, number of examples."""
    from sensitivity.study.racing import spread

    lines, best = [], best_so_far(study)
    shown, left_out = spread([trial.bpw for trial in best], most)
    for trial in (best[i] for i in shown):
        point = _point(trial)
        score = point["scores"][study.tasks[0]]
        ends = score["low"], score["high"], score["n"]
        span = "" if None in ends else " [{:.3f}, {:.3f}] n {:,}".format(*ends)
        lines.append(f"{point['bpw']:5.2f} bpw  {score['mean']:.3f}{span}  {point['plan']}")
    return [*lines, left_out] if left_out else lines


def _point(trial: Trial) -> ShownPlan:
    """A trial as JSON values: size, plan, scores with intervals."""
    scores: dict[str, ScorePoint] = {}
    for task, score in trial.scores.items():
        scores[task] = ScorePoint(mean=score["mean"], low=score.get("low"), high=score.get("high"), n=score.get("n"))
        if "repetitions" in score:
            scores[task]["repetitions"] = score["repetitions"]
    return {"bpw": round(trial.bpw, 4), "key": trial.key, "plan": trial.plan.describe(), "scores": scores}
