"""Counts of answers that a mean score hides: changed, empty, cut and malformed ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sensitivity.study.examples.pairing import base_scores

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AnswerCounts:
    """Counts over the examples of a task, or of one kind of its questions; None where that is not known.

    A change is between full precision and the plan on the same example: to a lower score, or to a higher one. Where
    scores are 0 or 1, that is from right to wrong, and from wrong to right.
    """

    to_wrong: int | None
    to_right: int | None
    empty: int
    cut: int | None
    malformed: int | None

    def to_json(self) -> dict[str, int | None]:
        """The counts by name."""
        return asdict(self)


def count_answers(rows: pd.DataFrame, base: pd.DataFrame | None) -> AnswerCounts:
    """The counts of one task's rows; changes are against `base`, the rows of full precision."""
    worse = better = None
    if base is not None:
        before = base_scores(rows, base)
        worse, better = int((rows["score"] < before).sum()), int((rows["score"] > before).sum())
    empty = int((rows["answer"].astype(str).str.strip() == "").sum())
    cut, malformed = (None if rows[name].isna().any() else int(rows[name].sum()) for name in ("cut", "malformed"))
    return AnswerCounts(worse, better, empty, cut, malformed)


def counts_by_kind(rows: pd.DataFrame, base: pd.DataFrame | None) -> Iterator[dict[str, object]]:
    """For each task, its mean score and counts over all its questions (kind None), then over those of each kind."""
    for task, of_task in rows.groupby("task", sort=False):
        theirs = None if base is None else base[base["task"] == task]
        kinds = sorted(of_task["kind"].unique())
        for kind in [None, *(kinds if len(kinds) > 1 else ())]:
            some = of_task if kind is None else of_task[of_task["kind"] == kind]
            yield {
                "task": task,
                "kind": kind,
                "n": len(some),
                "score": float(some["score"].mean()),
                **count_answers(some, theirs).to_json(),
            }
