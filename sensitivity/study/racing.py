"""Racing: which plans still get examples, as no smaller plan clearly beats them; and how uncertain the frontier is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial
from scipy import stats

from sensitivity.spec.errors import UserError
from sensitivity.study import answers
from sensitivity.study.study import Study

RATE = 0.05  # probability, over a whole sweep, that any plan is dropped which no smaller one truly beats


MOST = 1e6  # largest number that --until takes, in any unit


def frontier(trials: Sequence[FrozenTrial], task: str) -> list[FrozenTrial]:
    """The Pareto frontier, smallest first: trials with a higher mean score than every other of at most their size."""
    best, found = -math.inf, []
    for trial in sorted(trials, key=lambda t: (_bpw(t), -_mean(t, task), t.number)):
        if _mean(trial, task) > best:
            best = _mean(trial, task)
            found.append(trial)
    return found


def still_in_race(study: Study, rounds: int) -> set[str]:
    """The keys of the plans that stay in the race: all but those that a plan of at most their size beats on every task.

    Each is compared by a one-sided paired test over images, at RATE divided by the number of plans and of rounds of
    examples (Bonferroni), so that RATE holds for the whole sweep.
    """
    trials = study.measured()
    level = RATE / (rounds * max(1, len(trials)))
    matter = study.unmeasured() | {study.native.key}
    for task in study.tasks:
        best = frontier(trials, task)
        for trial in trials:
            # the frontier's scores rise with size, so its last plan of at most this size is the strongest rival
            rivals = [rival for rival in best if _bpw(rival) <= _bpw(trial) and rival is not trial]
            if not rivals or not _beats(_sums(study, rivals[-1], task), _sums(study, trial, task), level):
                matter.add(trial.user_attrs["key"])
    return matter


def uncertainty(study: Study) -> float:
    """The largest half 95 % interval of a frontier plan's difference to full precision; infinite without that."""
    trials = study.measured()
    native = next((trial for trial in trials if trial.user_attrs["key"] == study.native.key), None)
    if native is None:
        return math.inf
    widest = 0.0
    for task in study.tasks:
        for trial in frontier(trials, task):
            if trial is not native:
                _, se, clusters = _difference(_sums(study, trial, task), _sums(study, native, task))
                widest = max(widest, se * float(stats.t.ppf(0.975, max(1, clusters - 1))))
    return widest


def _beats(rival: pd.DataFrame, plan: pd.DataFrame, level: float) -> bool:
    """Whether the rival's score is significantly higher.

    Two made-up images are added, one for and one against the rival, each as large as the largest difference seen: a
    handful of images that happen to agree have a standard error of 0, and would prove anything.
    """
    mean, se, clusters = _difference(rival, plan, wary=True)
    return mean > 0 and clusters > 3 and mean > se * float(stats.t.isf(level, clusters - 1))


def _difference(a: pd.DataFrame, b: pd.DataFrame, wary: bool = False) -> tuple[float, float, int]:
    """Mean difference of two plans over the images that both have seen, its clustered error, the number of images."""
    both = a.index.intersection(b.index)
    counts = a.loc[both, "count"].to_numpy(dtype=float)
    differences = (a.loc[both, "sum"] - b.loc[both, "sum"]).to_numpy()
    if wary and len(both):
        extreme = float(np.max(np.abs(differences / counts), initial=0.0)) * float(counts.mean())
        differences, counts = np.append(differences, [extreme, -extreme]), np.append(counts, [counts.mean()] * 2)
    images = len(counts)
    if images < 2:
        return 0.0, math.inf, images
    # images have different numbers of examples: the mean is a ratio of sums, with the error of a ratio estimator
    mean = float(differences.sum() / counts.sum())
    spread = float(np.sum((differences - mean * counts) ** 2))
    return mean, math.sqrt(images / (images - 1) * spread) / float(counts.sum()), images


def _sums(study: Study, trial: FrozenTrial, task: str) -> pd.DataFrame:
    """A trial's scores summed per image, and the number of examples of each image."""
    attrs = trial.user_attrs
    return _read(study.path / "examples" / f"{attrs['key']}.parquet", attrs["scores"][task]["n"], task)


@lru_cache(maxsize=4096)
def _read(path: Path, n: int, task: str) -> pd.DataFrame:
    """The sums from a file of answers, cached; `n` is an argument because the file grows with the examples."""
    try:
        rows = answers.read(path)
    except answers.Damaged as error:
        raise UserError(f"{path} is damaged ({error}); the same sweep command runs that plan again") from error
    return rows[rows["task"] == task].groupby("cluster")["score"].agg(["sum", "count"])


def _bpw(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["size"]["bpw"])


def _mean(trial: FrozenTrial, task: str) -> float:
    return float(trial.user_attrs["scores"][task]["mean"])
