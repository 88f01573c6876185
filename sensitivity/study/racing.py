"""Racing: which plans still get examples, as no smaller one clearly beats them; and how uncertain the frontier is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from sensitivity.spec.errors import UserError
from sensitivity.study import answers
from sensitivity.study.scores import least_half_width, se_of_residuals
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.study.trial import Trial

Difference = tuple[float, float, int]  # mean, standard error, number of images
# largest probability, over a whole sweep, that any plan is dropped although no smaller one beats it
FALSE_DROP_RATE = 0.05


class Seen(NamedTuple):
    """The examples of a task that a trial has seen so far: the first `n` in its file of answers, which only grows."""

    path: Path
    n: int
    task: str


def frontier(size: ArrayLike, score: ArrayLike) -> list[int]:
    """The Pareto frontier as positions, smallest first: each scores higher than everything of at most its size."""
    best, on_frontier = -math.inf, []
    scores = np.asarray(score, dtype=float)
    for i in np.lexsort((-scores, np.asarray(size, dtype=float))):  # of equal sizes and scores the first
        if scores[i] > best:
            best = scores[i]
            on_frontier.append(int(i))
    return on_frontier


def frontier_trials(trials: Sequence[Trial], task: str) -> list[Trial]:
    """The trials on the frontier of a task's mean score against size, smallest first."""
    scores = [trial.scores[task]["mean"] for trial in trials]
    return [trials[i] for i in frontier([trial.bpw for trial in trials], scores)]


def spread(sizes: Sequence[float], most: int) -> tuple[list[int], str]:
    """The positions of at most so many of a frontier's rising sizes, and a sentence on those left out, if any.

    They are spread evenly: those that are closest to their neighbors, as a ratio, are left out.
    """
    kept = list(range(len(sizes)))
    while len(kept) > max(most, 2):
        gaps = [sizes[after] / sizes[before] for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    if len(kept) == len(sizes):
        return kept, ""
    return kept, f"{len(kept)} of the frontier's {len(sizes):,} plans, spread over all sizes"


def still_in_race(study: Study, rounds: int) -> set[str]:
    """The keys of the plans that stay in the race: all but those that a plan of at most their size beats on every task.

    Each is compared by a one-sided paired test over images. Its level is FALSE_DROP_RATE divided by the number of plans
    and of rounds of examples (Bonferroni), so that FALSE_DROP_RATE holds for the whole sweep.
    """
    trials = study.measured()
    level = FALSE_DROP_RATE / (rounds * max(1, len(trials)))
    staying = study.unmeasured() | {study.native.key}
    for task in study.tasks:
        best = frontier_trials(trials, task)
        for trial in trials:
            # the frontier's scores rise with size, so its last plan of at most this size is the strongest rival
            rivals = [rival for rival in best if rival.bpw <= trial.bpw and rival is not trial]
            pair = [_seen(study, one, task) for one in (*rivals[-1:], trial)]
            if not rivals or not _beats(_compared(*pair, made_up=True), level):
                staying.add(trial.key)
    return staying


def uncertainty(study: Study) -> float:
    """Half the widest 95 % interval of a frontier plan's difference to full precision; infinite if that did not run."""
    trials = study.measured()
    native = next((trial for trial in trials if trial.key == study.native.key), None)
    if native is None:
        return math.inf
    widest = 0.0
    for task in study.tasks:
        for trial in frontier_trials(trials, task):
            if trial is not native:
                widest = max(widest, _half_width(_seen(study, trial, task), _seen(study, native, task)))
    return widest


def _half_width(first: Seen, second: Seen) -> float:
    """Half the 95 % interval of the difference of two trials, no narrower than it would be in a table."""
    _, se, clusters = _compared(first, second)
    half = se * float(stdtrit(max(1, clusters - 1), 0.975))
    if clusters < 2:
        return half
    a, b = _sums(first), _sums(second)
    both = a.index.intersection(b.index)
    counts = a.loc[both, "count"].to_numpy(dtype=float)
    ours, theirs = (one.loc[both, "sum"].to_numpy() / counts for one in (a, b))
    return max(half, least_half_width(ours - theirs, ours, int(counts.sum())))


def _beats(difference: Difference, level: float) -> bool:
    """Whether the first of two plans scores significantly higher."""
    mean, se, clusters = difference
    return mean > 0 and clusters > 3 and mean > -se * float(stdtrit(clusters - 1, level))


@lru_cache(maxsize=65536)  # after a step of a sweep, almost all pairs are those of the step before
def _compared(first: Seen, second: Seen, made_up: bool = False) -> Difference:
    """`_difference` of what two trials have seen."""
    return _difference(_sums(first), _sums(second), made_up)


def _difference(a: pd.DataFrame, b: pd.DataFrame, made_up: bool = False) -> Difference:
    """Mean difference of two plans over the images both have seen, its clustered standard error, number of images.

    With `made_up` two images are added, one for and one against the first, each with the largest difference seen.
    Without them, a handful of images that happen to agree would have a standard error of 0, and would prove anything.
    """
    both = a.index.intersection(b.index)
    counts = a.loc[both, "count"].to_numpy(dtype=float)
    differences = (a.loc[both, "sum"] - b.loc[both, "sum"]).to_numpy()
    if made_up and len(both):
        extreme = float(np.max(np.abs(differences / counts), initial=0.0)) * float(counts.mean())
        differences, counts = np.append(differences, [extreme, -extreme]), np.append(counts, [counts.mean()] * 2)
    images = len(counts)
    if images < 2:
        return 0.0, math.inf, images
    # images have different numbers of examples: the mean is a ratio of sums
    n = float(counts.sum())
    mean = float(differences.sum()) / n
    return mean, se_of_residuals(differences - mean * counts, n), images


def _seen(study: Study, trial: Trial, task: str) -> Seen:
    return Seen(paths.answers_file(study.path, trial.key), trial.scores[task]["n"], task)


@lru_cache(maxsize=4096)
def _sums(seen: Seen) -> pd.DataFrame:
    """Scores summed per image, and the number of examples of each image."""
    try:
        rows = answers.read(seen.path)
    except answers.Damaged as error:
        raise UserError(f"{seen.path} is damaged ({error}); the same sweep command runs that plan again") from error
    return rows[rows["task"] == seen.task].groupby("cluster")["score"].agg(["sum", "count"])
