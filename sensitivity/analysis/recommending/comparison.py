"""A paired comparison of two plans on the same examples, and its verdict in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy import stats

from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, SchemeJson
from sensitivity.study.counting import count
from sensitivity.study.scores import LEAST_CLUSTERS, Score, ScoreJson, paired_difference, summarize

# as many more examples as are named decide with this probability, if the difference is as large as it seems
POWER = 0.8
DECIDE = f"more examples would decide with a probability of {100 * POWER:.0f} %"


class ComparisonJson(TypedDict):
    """A comparison as JSON values."""

    other: dict[str, SchemeJson | None]
    describe: str
    score: ScoreJson
    difference: ScoreJson
    verdict: str
    more_examples: int | None
    words: str


@dataclass(frozen=True)
class Comparison:
    """A paired difference of our plan to another, and its verdict.

    'better', 'tied' and 'worse' are about our plan; 'no worse' is about the other, which scores at least as high. With
    'too few' images, nothing is said.
    """

    other: Plan
    score: Score  # the other plan's
    difference: Score  # ours minus theirs; the interval allows for having picked the best of several candidates
    verdict: str
    more: int | None  # examples that would likely decide a tie; None: none needed, or no number would do
    words: str

    def to_json(self) -> ComparisonJson:
        """The comparison as JSON values."""
        return {
            "other": self.other.to_json(),
            "describe": self.other.describe(),
            "score": self.score.to_json(),
            "difference": self.difference.to_json(),
            "verdict": self.verdict,
            "more_examples": self.more,
            "words": self.words,
        }

    @classmethod
    def from_json(cls, data: ComparisonJson) -> Comparison:
        """The comparison that `to_json` wrote."""
        return cls(
            Plan.from_json(data["other"]),
            Score.from_json(data["score"]),
            Score.from_json(data["difference"]),
            data["verdict"],
            data["more_examples"],
            data["words"],
        )


def compare_with_plan(
    mine: pd.DataFrame,
    theirs: pd.DataFrame,
    other: Plan,
    name: str,
    tries: int = 1,
    score: Score | None = None,
    fresh: bool = True,
) -> Comparison:
    """Compare our scores of shared examples with another plan's.

    tries: how many plans ours was, or could have been, chosen from. score: theirs, by default the mean of their
    examples. fresh: these examples had no part in the choice; where they had, the task has less than twice as many.
    """
    both = mine.merge(theirs, on="example", suffixes=("", "_other"))
    if not len(both):
        raise UserError(f"{other.describe()} was measured on other examples: nothing can be compared")
    difference = paired_difference(both["score"], both["score_other"], both["cluster"], tries)
    verdict, more, words = _verdict(difference, name, tries, math.inf if fresh else both["example"].nunique())
    score = score or summarize(theirs["score"], theirs["cluster"])
    return Comparison(other, score, difference, verdict, more, words)


def kept_of(mine: pd.DataFrame, full: pd.DataFrame, share: float) -> Score:
    """The share of full precision's score that ours is, with the interval of how far it lies from a given share."""
    both = mine.merge(full, on="example", suffixes=("", "_full"))
    beyond = paired_difference(both["score"], share * both["score_full"], both["cluster"])
    whole = float(both["score_full"].mean()) or 1.0
    mean, low, high = (share + value / whole for value in (beyond.mean, beyond.low, beyond.high))
    return Score(mean, beyond.se / whole, beyond.n, beyond.clusters, low, high)


def floor_in_words(task: str, share: float, kept: Score, full: float) -> str:
    """Whether a plan keeps the share of full precision that was asked for."""
    how = "is kept" if kept.mean >= share else "is missed"
    how += " on these examples, within their noise" if kept.low < share <= kept.high else ""
    interval = (
        f"{100 * kept.mean:.1f} % [{100 * kept.low:.1f} %, {100 * kept.high:.1f} %] of full precision's {full:.3f}"
    )
    return f" The floor of {share:.4g} on {task} {how}: {interval}, {count(kept.n, 'paired example')}."


def _verdict(difference: Score, name: str, tries: int, unseen: float) -> tuple[str, int | None, str]:
    """The verdict, the number of examples that would decide a tie, and a sentence; fewer than `unseen` remain."""
    gap, low, high, pairs = difference.mean, difference.low, difference.high, count(difference.n, "paired example")
    if difference.clusters < LEAST_CLUSTERS:
        images = count(difference.clusters, "image")
        return "too few", None, f"Too few images to compare with {name}: {gap:+.3f}, {pairs} of {images}."
    interval = f"{gap:+.3f} [{low:+.3f}, {high:+.3f}], {pairs}"
    interval += f" (interval widened for the best of {tries} plans)" if tries > 1 else ""
    if low > 0:
        return "better", None, f"Clearly better than {name}: {interval}."
    if high < 0:
        return "worse", None, f"{name[0].upper()}{name[1:]} is clearly better: {interval} for the solved plan."
    if gap <= 0:
        return "no worse", None, f"{name[0].upper()}{name[1:]} did no worse on these examples: {interval}."
    more = more_examples(difference)
    if more is None:
        return "tied", None, f"Tied with {name}: {interval}; no practical number of examples would decide."
    if more >= unseen:
        return (
            "tied",
            None,
            f"Tied with {name}: {interval}; about {more:,} {DECIDE}, and are not there.",
        )
    return "tied", more, f"Tied with {name}: {interval}; about {more:,} {DECIDE}."


def more_examples(difference: Score) -> int | None:
    """How many more examples would show a difference of this size, if it is real, with probability POWER."""
    if not math.isfinite(difference.se) or difference.mean == 0:
        return None
    # A difference is found with this power if it is as large as the interval's half width plus the power's normal
    # quantile, both in standard errors. The standard error falls with the root of n: solved for n.
    # one end of the interval may be cut off, at the largest difference that there can be
    half = max(difference.high - difference.mean, difference.mean - difference.low)
    width = half / difference.se if difference.se else 2.0
    wanted = difference.n * ((width + float(stats.norm.ppf(POWER))) * difference.se / difference.mean) ** 2
    more = wanted - difference.n
    if more > 1000 * difference.n:
        return None
    # rounded up to two digits: the estimate is rough
    digits = max(1.0, 10 ** math.floor(math.log10(max(more, 1.0))) / 10)
    return max(1, int(np.ceil(more / digits) * digits))
