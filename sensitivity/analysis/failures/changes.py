"""Examples whose answers differ between two plans, ordered by what the change cost."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sensitivity.spec.errors import UserError, shell_word, unknown
from sensitivity.spec.plan import Plan
from sensitivity.study.examples.questions import Question, Questions
from sensitivity.study.storage import paths
from sensitivity.study.study import Study

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GivenAnswer:
    """An answer that was given, and the probability per token of the right one."""

    answer: str
    score: float
    sure: float | None  # that probability


@dataclass(frozen=True)
class Change:
    """One example that two plans answered differently."""

    task: str
    example: str
    kind: str
    before: GivenAnswer
    after: GivenAnswer
    question: Question | None  # None if neither the study nor its data still hold it

    @property
    def cost(self) -> float:
        """By how much the score fell; negative where it rose."""
        return self.before.score - self.after.score

    @property
    def direction(self) -> str:
        """Whether the score fell or rose, in a word."""
        return "lower" if self.cost > 0 else "higher" if self.cost < 0 else "the same"

    def to_json(self) -> dict[str, object]:
        """The change as JSON values."""
        asked = self.question
        return {
            "task": self.task,
            "example": self.example,
            "kind": self.kind,
            "question": asked and asked.prompt,
            "right": asked and list(asked.answers),
            "images": asked and [None if file is None else str(file) for file in asked.images],
            "before": asdict(self.before),
            "after": asdict(self.after),
            "cost": self.cost,
        }


def changed_answers(
    after: pd.DataFrame, before: pd.DataFrame, asked: Questions, task: str = "", kind: str = "", both_ways: bool = False
) -> list[Change]:
    """All examples that both plans have seen and whose answers or scores differ, those that cost most first.

    Among equal costs, the example whose right answer lost the most likelihood comes first. `both_ways`: those whose
    scores differ most come first, and among equal ones losses and gains in turn.
    """
    both = before.merge(after, on=["task", "example"], suffixes=("_before", ""))
    both = _chosen(_chosen(both, "task", task), "kind", kind)
    both = both[(both["answer_before"] != both["answer"]) | (both["score_before"] != both["score"])]
    lost = (both["nll"] - both["nll_before"]).fillna(0.0)
    order = both.assign(cost=both["score_before"] - both["score"], lost=lost)
    order = order.sort_values(["cost", "lost", "task", "example"], ascending=[False, False, True, True])
    if both_ways:
        turn = order.groupby("cost").cumcount()
        order = order.assign(size=order["cost"].abs(), turn=turn)
        order = order.sort_values(["size", "turn", "cost"], ascending=[False, True, False])
    return list(_changes(order, asked))


def _chosen(rows: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """The rows with this value in a column, where it must occur; all rows if the value is empty."""
    if value and value not in (known := sorted(rows[column].unique())):
        raise unknown(column, value, known)
    return rows[rows[column] == value] if value else rows


def _changes(rows: pd.DataFrame, asked: Questions) -> Iterator[Change]:
    """A change for each row of both plans' answers."""
    for row in rows.to_dict("records"):
        task, example = str(row["task"]), str(row["example"])
        before, after = _given(row, "_before"), _given(row, "")
        yield Change(task, example, str(row["kind"]), before, after, asked.get((task, example)))


def _given(row: Mapping[Hashable, Any], end: str) -> GivenAnswer:
    """The answer of one of the two plans, whose columns end in `end`."""
    return GivenAnswer(str(row[f"answer{end}"]), float(row[f"score{end}"]), _sure(row[f"nll{end}"]))


def _sure(nll: float) -> float | None:
    """The probability per token; None where it is not known."""
    return math.exp(-nll) if math.isfinite(nll) else None


def study_of(study: Study, plan: Plan) -> Study:
    """Where a plan's answers are: in the study of its verification on fresh examples, else in the study itself."""
    verification = paths.verification_folder(study.path)
    places = [Study(verification), study] if paths.is_study(verification) else [study]
    for one in places:
        if one.examples(plan) is not None and one.examples(one.native) is not None:
            return one
    if all(study.examples(trial.plan) is None for trial in study.measured()):
        raise UserError(
            f"{study.path} has no answers to single examples, which could be compared; a table that was imported and a "
            "study that was shared hold means alone"
        )
    raise UserError(
        f"{study.path} has no answers of the plan {plan.describe()} and of full precision: one of them was not run. "
        "`recommend` without --no-run runs a plan that it recommends; --plan KEY names one that was measured "
        f"(`sensitivity table {shell_word(study.path)} --out plans.csv` lists them)"
    )


def on_examples_of(study: Study, measured_in: Study) -> str:
    """In words, on which examples a plan of a study was measured; whether a verification's are fresh is not known."""
    return f"on the examples of the {'sweep' if measured_in is study else 'verification'}"
