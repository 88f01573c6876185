"""Medians of times with intervals, for each stage of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from scipy import stats

from sensitivity.formats.timing.timed_process import Round, TimedStage
from sensitivity.study.scores import CONFIDENCE

FEWEST = 6  # the range of at least this many values contains the true median with 95 % confidence


class Interval(TypedDict):
    """A median over n rounds, with an interval that makes no assumption about their distribution."""

    median: float
    least: float
    low: float
    high: float
    n: int


# name of a stage -> that stage of a round
STAGES: dict[str, Callable[[Round], TimedStage]] = {
    "image": lambda one: one.image,
    "prompt token": lambda one: one.prompt,
    "new token": lambda one: one.new,
}
# name of a clock -> milliseconds of a stage, per image or per token
CLOCKS: dict[str, Callable[[TimedStage], float]] = {
    "ms": lambda stage: 1e3 * stage.wall / stage.count,
    "CPU ms": lambda stage: 1e3 * stage.cpu / stage.count,
}


def times(rounds: Sequence[Round]) -> dict[str, Interval]:
    """Wall-clock and CPU milliseconds per image and per token over all rounds, and tokens per second."""
    found = {
        f"{clock} per {name}": interval([ms(stage(one)) for one in rounds])
        for clock, ms in CLOCKS.items()
        for name, stage in STAGES.items()
    }
    return {**found, "tokens per second": interval([one.new.count / one.new.wall for one in rounds])}


def times_faster(ours: Sequence[Round], full: Sequence[Round]) -> dict[str, Interval]:
    """How many times faster the export is than full precision, paired by round."""
    return {
        f"{clock} per {name}": interval(
            [ms(stage(two)) / ms(stage(one)) for one, two in zip(ours, full, strict=True) if ms(stage(one)) > 0]
        )
        for clock, ms in CLOCKS.items()
        for name, stage in STAGES.items()
    }


def interval(values: Sequence[float]) -> Interval:
    """The median, and the order statistics between which it lies with at least 95 % confidence (binomial)."""
    n, ordered = len(values), sorted(values)
    if not n:  # the clock was too coarse: it showed 0 for every round
        nan = float("nan")
        return {"median": nan, "least": nan, "low": nan, "high": nan, "n": 0}
    below = max(int(stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)) - 1, 0)
    median = float(np.median(ordered))
    return {"median": median, "least": ordered[0], "low": ordered[below], "high": ordered[n - 1 - below], "n": n}
