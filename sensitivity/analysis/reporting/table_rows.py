"""Selects the rows of a study's table that figures and tables show."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sensitivity.spec.errors import shell_word
from sensitivity.study.racing import frontier, spread
from sensitivity.study.study import Study


def frontier_rows(table: pd.DataFrame, task: str, column: str = "bpw") -> pd.DataFrame:
    """The rows on the frontier of a task's score against size, or another cost, smallest first."""
    rows = table[table[task].notna() & table[column].notna()]
    return rows.iloc[frontier(rows[column], rows[task])]


def shown_of_frontier(study: Study, table: pd.DataFrame, task: str, most: int) -> tuple[pd.DataFrame, str]:
    """At most so many rows of a task's frontier, spread over all sizes, and a sentence on those left out, if any."""
    every = frontier_rows(table, task)
    shown, left_out = spread(every["bpw"].tolist(), most)
    if left_out:
        left_out += f"; `sensitivity watch {shell_word(study.path)} --json` lists all"
    return every.iloc[shown], left_out


def quantized(table: pd.DataFrame) -> pd.DataFrame:
    """All plans but full precision.

    A figure that averages over the other components would show it alone at 16 bits, where nothing was averaged.
    """
    return table[~table["native"]]


def single(table: pd.DataFrame, names: Sequence[str], name: str) -> pd.DataFrame:
    """The plans in which no component but this one is quantized."""
    others = [other for other in names if other != name]
    return table[(table[others] == 16).all(axis=1)]
