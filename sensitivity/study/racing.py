"""Which plans still matter: those on the frontier, and those that no smaller plan clearly beats; and when to stop."""

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

RATE = 0.05  # at most this often is a plan dropped that no smaller one truly beats


MOST = 1e6  # of any unit


def frontier(trials: Sequence[FrozenTrial], task: str) -> list[FrozenTrial]:
    """The plans that no smaller one outscores, from the smallest; equals at one size are one plan."""
    best, found = -math.inf, []
    for trial in sorted(trials, key=lambda t: (_bpw(t), -_mean(t, task), t.number)):
        if _mean(trial, task) > best:
            best = _mean(trial, task)
            found.append(trial)
    return found


def still_in_race(study: Study, rounds: int) -> set[str]:
    """The keys of the plans that matter: all but those that, on every task, a plan of at most their size clearly beats.

    One-sided paired tests between the plans' scores image by image, corrected for every plan that is compared and
    for every round of examples after which it is looked at, so that RATE holds for the whole sweep.
    """
    trials = study.measured()
    level = RATE / (rounds * max(1, len(trials)))
    matter = study.unmeasured() | {study.native.key}
    for task in study.tasks:
        best = frontier(trials, task)
        for trial in trials:
            rivals = [rival for rival in best if _bpw(rival) <= _bpw(trial) and rival is not trial]
            if not rivals or not _beats(_sums(study, rivals[-1], task), _sums(study, trial, task), level):
                matter.add(trial.user_attrs["key"])
    return matter


def uncertainty(study: Study) -> float:
    """The widest half interval of a frontier plan's difference to full precision; infinite without one to compare."""
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
    """Whether the rival's score is higher beyond doubt.

    One image that speaks for and one that speaks against the rival are added, as large as the largest difference
    seen: a handful of images that agree is not the absence of noise.
    """
    mean, se, clusters = _difference(rival, plan, wary=True)
    return mean > 0 and clusters > 3 and mean > se * float(stats.t.isf(level, clusters - 1))


def _difference(a: pd.DataFrame, b: pd.DataFrame, wary: bool = False) -> tuple[float, float, int]:
    """The mean difference of two plans over the images that both have seen, its clustered error, and their number."""
    both = a.index.intersection(b.index)
    counts = a.loc[both, "count"].to_numpy(dtype=float)
    differences = (a.loc[both, "sum"] - b.loc[both, "sum"]).to_numpy()
    if wary and len(both):
        extreme = float(np.max(np.abs(differences / counts), initial=0.0)) * float(counts.mean())
        differences, counts = np.append(differences, [extreme, -extreme]), np.append(counts, [counts.mean()] * 2)
    images = len(counts)
    if images < 2:
        return 0.0, math.inf, images
    mean = float(differences.sum() / counts.sum())
    spread = float(np.sum((differences - mean * counts) ** 2))
    return mean, math.sqrt(images / (images - 1) * spread) / float(counts.sum()), images


def _sums(study: Study, trial: FrozenTrial, task: str) -> pd.DataFrame:
    """Per image the sum of a plan's scores and their number."""
    attrs = trial.user_attrs
    return _read(study.path / "examples" / f"{attrs['key']}.parquet", attrs["scores"][task]["n"], task)


@lru_cache(maxsize=4096)
def _read(path: Path, n: int, task: str) -> pd.DataFrame:
    """`n` is part of the key: the file grows."""
    try:
        rows = answers.read(path)
    except answers.Damaged as error:
        raise UserError(
            f"{path} is damaged ({error}); the sweep's command, given again, runs that plan again"
        ) from error
    return rows[rows["task"] == task].groupby("cluster")["score"].agg(["sum", "count"])


def _bpw(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["size"]["bpw"])


def _mean(trial: FrozenTrial, task: str) -> float:
    return float(trial.user_attrs["scores"][task]["mean"])
