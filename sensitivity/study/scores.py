"""Scores with n, a standard error clustered by image and a confidence interval; paired differences between plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Required, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit  # scipy.stats has the same, and takes a second to import

from sensitivity.study.counting import count
from sensitivity.study.examples.pairing import base_scores

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
ROUNDING = 1e-12  # differences that are closer than this are the same
FEW = 4  # with so many examples that differ, Student's interval is as wide as Wilson's limit where none differs
LEAST_CLUSTERS = 6  # for a verdict: if all of fewer differ the same way, a sign test still shows nothing at 95 %


class ScoreJson(TypedDict):
    """A score as JSON values; null stands for infinity, since one cluster says nothing about the spread."""

    mean: float
    se: float | None
    n: int
    clusters: int
    low: float | None
    high: float | None


class TaskScore(TypedDict, total=False):
    """A task's score as a trial stores it; an imported one has only its mean."""

    mean: Required[float]
    se: float | None
    n: int
    clusters: int
    low: float | None
    high: float | None
    nll: float | None  # mean over the examples that have one
    repetitions: int  # of how many rows of an imported table it is the mean, where the plan has several


@dataclass(frozen=True)
class Score:
    """A mean over n examples that fall into clusters (questions of one image), and its 95 % interval."""

    mean: float
    se: float
    n: int
    clusters: int
    low: float
    high: float

    def to_json(self) -> ScoreJson:
        """The score as a dictionary of its fields."""
        return {
            "mean": self.mean,
            "se": self.se,
            "n": self.n,
            "clusters": self.clusters,
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_json(cls, data: ScoreJson) -> Score:
        """The score that `to_json` wrote."""
        return cls(
            data["mean"],
            math.inf if data["se"] is None else data["se"],
            data["n"],
            data["clusters"],
            -math.inf if data["low"] is None else data["low"],
            math.inf if data["high"] is None else data["high"],
        )

    @property
    def signed(self) -> str:
        """A difference and its interval as text."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        images = f" on {count(self.clusters, 'image')}" if self.clusters < self.n else ""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n {self.n:,}{images})"


def clustered_se(values: np.ndarray, clusters: np.ndarray) -> tuple[float, int]:
    """Standard error of the mean when examples of one cluster are correlated, and the number of clusters.

    With one cluster the spread is unknown, and the error infinite.
    """
    _, index = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(index, weights=values - values.mean())
    return se_of_residuals(residuals, len(values)), len(residuals)


def se_of_residuals(residuals: np.ndarray, n: float) -> float:
    """The standard error of a mean over n examples, from its residuals, summed within each cluster.

    The usual sandwich estimator, with the small-sample factor G / (G - 1) for G clusters.
    """
    clusters = len(residuals)
    return math.sqrt(clusters / (clusters - 1) * float(np.sum(residuals**2))) / n if clusters > 1 else math.inf


def summarize(values: ArrayLike, clusters: ArrayLike) -> Score:
    """The mean score and its interval: Wilson's for scores from 0 to 1, which has a width even if all are right."""
    x, group = np.asarray(values, dtype=float), np.asarray(clusters)
    if not len(x):
        raise ValueError("a score needs at least one example")
    mean = float(x.mean())
    se, images = clustered_se(x, group)
    if _is_share(x):
        low, high = _wilson(mean, se, len(x), images)
    else:
        low, high = _student(mean, se, images)
    return Score(mean, se, len(x), images, low, high)


def paired_difference(
    values: ArrayLike, base: ArrayLike, clusters: ArrayLike, tries: int = 1, *, itself: bool = False
) -> Score:
    """The mean difference to a baseline on the same examples, with an interval by Student's t.

    It ends where a difference must: scores from 0 to 1 differ by at most 1.
    tries: how many comparisons are made at once; each gets its part of the probability of an error (Bonferroni).
    itself: both are the same answers of the same plan, which does not differ from itself on any example.
    """
    x, y = np.asarray(values, dtype=float), np.asarray(base, dtype=float)
    difference = x - y
    mean = float(difference.mean())
    se, images = clustered_se(difference, np.asarray(clusters))
    if itself:
        low = high = mean
    else:
        low, high = _student(mean, se, images, tries)
        if images > 1:
            least = least_half_width(difference, x, len(x), tries)
            low, high = min(low, mean - least), max(high, mean + least)
    if _is_share(x) and _is_share(y):
        low, high = max(low, -1.0), min(high, 1.0)
    return Score(mean, se, len(difference), images, low, high)


def independent_difference(a: Score, b: Score) -> Score:
    """B minus A where both are means of examples of their own.

    By the intervals of both (Newcombe's method), which have a width even if all answers of both are right.
    """
    mean = b.mean - a.mean
    low = mean - math.hypot(b.mean - b.low, a.high - a.mean)
    high = mean + math.hypot(b.high - b.mean, a.mean - a.low)
    return Score(mean, math.hypot(a.se, b.se), min(a.n, b.n), min(a.clusters, b.clusters), low, high)


def task_score(rows: pd.DataFrame) -> TaskScore:
    """A task's score from its examples, as a trial stores it."""
    nll = rows["nll"].dropna()
    found = cast(TaskScore, summarize(rows["score"], rows["cluster"]).to_json())
    return {**found, "nll": float(nll.mean()) if len(nll) else None}


def mean_of_repetitions(scores: Sequence[TaskScore]) -> TaskScore:
    """The score of a plan that was measured several times, with Student's interval over the repetitions.

    Where all of them are equal, they are copies of one measurement and say nothing about its noise.
    """
    means = np.array([score["mean"] for score in scores])
    mean, n = float(means.mean()), len(means)
    found: TaskScore = {"mean": mean, "repetitions": n}
    if np.ptp(means) <= ROUNDING:
        return found
    se = float(means.std(ddof=1)) / math.sqrt(n)
    low, high = _student(mean, se, n)
    if _is_share(means):
        low, high = max(low, 0.0), min(high, 1.0)
    return {**found, "se": se, "low": low, "high": high}


def difference(ours: pd.DataFrame | None, theirs: pd.DataFrame | None, task: str) -> Score | None:
    """The paired difference in a task's score on the examples that both have seen."""
    if ours is None or theirs is None:
        return None
    mine = ours[ours["task"] == task]
    base = base_scores(mine, theirs[theirs["task"] == task])
    both = mine[base.notna()]
    if not len(both):
        return None
    return paired_difference(both["score"], base[base.notna()], both["cluster"], itself=ours is theirs)


def _is_share(scores: np.ndarray) -> bool:
    """Whether all scores lie from 0 to 1."""
    return bool(scores.min() >= 0 and scores.max() <= 1)


def _quantile(tries: int) -> float:
    """Up to which probability an interval reaches, if it is one of so many that shall all hold at once."""
    return 1 - (1 - CONFIDENCE) / 2 / tries


def _student(mean: float, se: float, clusters: int, tries: int = 1) -> tuple[float, float]:
    """Student's t interval, with one degree of freedom fewer than there are clusters."""
    half = math.inf if clusters < 2 else float(stdtrit(clusters - 1, _quantile(tries))) * se
    return mean - half, mean + half


def least_half_width(differences: np.ndarray, scores: np.ndarray, n: int, tries: int = 1) -> float:
    """The least half width of an interval of a paired difference; 0 unless it is the same on nearly all examples.

    Where fewer than FEW examples differ from the rest, their spread says little. Wilson's limit for 0 of n (as for a
    score of 0) says in how large a share of examples the difference could be another, either way. There it would be
    another by no more than the range of the scores.
    """
    if np.sum(np.abs(differences - np.median(differences)) > ROUNDING) >= FEW:
        return 0.0
    z = float(ndtri(_quantile(tries)))
    return z**2 / (n + z**2) * float(np.ptp(np.append(scores, [0.0, 1.0])))


def _wilson(mean: float, se: float, n: int, clusters: int) -> tuple[float, float]:
    """Wilson's interval with the effective number of examples that the clustered standard error implies.

    Where all are right or all wrong, or there is one cluster, the error implies no number. Then the number of clusters
    is used, which is cautious. A few wrong answers tell little more about how those of one image go together, so that
    no lower limit is above that of all right, and no upper one below that of all wrong.
    """
    spread = mean * (1 - mean)
    if spread == 0 or math.isinf(se):
        effective = float(clusters)
    else:
        effective = min(max(spread / se**2, 1.0), float(n)) if se else float(n)
    low, high = _wilson_limits(mean, effective)
    all_right, _ = _wilson_limits(1.0, clusters)
    return min(low, all_right), max(high, 1 - all_right)


def _wilson_limits(mean: float, n: float) -> tuple[float, float]:
    """Wilson's interval for a share of n independent examples."""
    z = float(ndtri((1 + CONFIDENCE) / 2))
    center = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)
