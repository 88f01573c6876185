"""The plans on a task's frontier as rows of a table: score, difference to full precision, counts of answers."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from sensitivity.analysis.reporting.table_rows import shown_of_frontier
from sensitivity.study.study import Study

MAX_ROWS = 40  # if more plans are on the frontier, so many are shown


@dataclass(frozen=True)
class FrontierRow:
    """One plan; what is not known is None."""

    key: str
    plan: str
    bpw: float
    score: float
    low: float | None
    high: float | None
    repetitions: int | None
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    to_wrong: int | None
    to_right: int | None
    empty: int | None
    cut: int | None
    malformed: int | None


def rows_of_frontier(study: Study, table: pd.DataFrame, task: str) -> tuple[list[FrontierRow], str]:
    """The rows of a study's table that are on a task's frontier, smallest first, and a sentence on those left out."""
    shown, left_out = shown_of_frontier(study, table, task, MAX_ROWS)
    return [_row(row, task) for row in shown.to_dict("records")], left_out


def _row(row: dict[object, object], task: str) -> FrontierRow:
    def known(name: str) -> float | None:
        value = row.get(f"{task}.{name}")
        return float(value) if isinstance(value, int | float) and value == value else None

    def count(name: str) -> int | None:
        value = known(name)
        return None if value is None else int(value)

    score, bpw = row[task], row["bpw"]
    assert isinstance(score, float)
    assert isinstance(bpw, float)
    # full precision's difference to itself says nothing
    delta = (None, None, None) if row["native"] else (known("delta"), known("delta.low"), known("delta.high"))
    return FrontierRow(
        str(row["key"])[:8], str(row["plan"]), float(bpw), float(score), known("low"), known("high"),
        count("repetitions"), *delta, count("to_wrong"), count("to_right"), count("empty"), count("cut"),
        count("malformed"),
    )  # fmt: skip
