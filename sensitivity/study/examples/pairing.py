"""Pairs the scores of two plans, example by example."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def base_scores(rows: pd.DataFrame, base: pd.DataFrame) -> pd.Series:
    """For each row of one task, the score of its example in `base`; missing where that has not seen the example.

    This is what a merge of the two would find, without joining columns that nobody reads.
    """
    return rows["example"].map(base.set_index("example")["score"])
