"""The two sides of a comparison: a study, or a plan of one; and the examples that both have seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sensitivity.analysis.recommending.comparison import DECIDE, more_examples
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEY_LENGTH, Plan
from sensitivity.study.examples.questions import Question, Questions, read_questions
from sensitivity.study.scores import Score, independent_difference, paired_difference, summarize
from sensitivity.study.storage import paths
from sensitivity.study.study import Study


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a study, or one plan of it."""

    study: Study
    plan: Plan | None = None

    @property
    def name(self) -> str:
        """The name of the side where both are shown."""
        return f"{self.study.path}:{self.plan.key[:KEY_LENGTH]}" if self.plan else str(self.study.path)


def side(text: str) -> Side:
    """The side that STUDY, or STUDY:KEY, means."""
    whole = Path(text).expanduser()
    if paths.is_study(whole):
        return Side(Study(whole))
    name, colon, key = text.rpartition(":")
    folder = Path(name).expanduser()
    if not colon or not key or not paths.is_study(folder):
        raise UserError(f"{text} is neither a study nor STUDY:KEY, a plan of one by its number or key")
    return Side(*plan_of(Study(folder), key))


def plan_of(study: Study, wanted: str) -> tuple[Study, Plan]:
    """The plan that a number or the beginning of a key names, and the study that measured it.

    That is this one, or else that of its verification, whose plans are named by key alone.
    """
    fresh = paths.verification_folder(study.path)
    if not any(trial.fits(wanted) for trial in study.measurements()) and paths.is_study(fresh):
        verified = Study(fresh)
        keys = {trial.key for trial in verified.measured() if trial.key.startswith(wanted)}
        if len(keys) == 1:
            return verified, verified.plan_named(keys.pop())
    return study, study.plan_named(wanted)


def both_sides(a_text: str, b_text: str) -> tuple[Side, Side]:
    """Both sides; if one is of a verification on fresh examples, the other too where that measured its plan.

    Full precision and some plans run on a study's own examples and on the fresh ones; only on the same they pair.
    """
    a, b = side(a_text), side(b_text)
    if paths.is_verification(a.study.path) == paths.is_verification(b.study.path):
        return a, b
    return (a, _verified(b, a)) if paths.is_verification(a.study.path) else (_verified(a, b), b)


def _verified(one: Side, other: Side) -> Side:
    """One side as its study's verification measured it; itself where that has no such plan."""
    plan, fresh = one.plan or other.plan, paths.verification_folder(one.study.path)
    if plan is not None and paths.is_study(fresh):
        verified = Study(fresh)
        if any(trial.key == plan.key for trial in verified.measured()):
            return Side(verified, plan)
    return one


@dataclass(frozen=True)
class Paired:
    """A task's scores on both sides, and B minus A: paired where both have seen the same examples, else unpaired."""

    task: str
    a: Score  # on all examples that A has seen
    b: Score
    difference: Score
    on_shared: tuple[Score, Score] | None  # A's and B's on the examples that both have seen; None if there are none
    to_wrong: int
    to_right: int

    @property
    def shared(self) -> int:
        """How many examples both have seen; with 0, the difference is that of independent samples."""
        return self.on_shared[0].n if self.on_shared else 0

    @property
    def compared(self) -> tuple[Score, Score]:
        """A's and B's score, of which the difference is the difference."""
        return self.on_shared or (self.a, self.b)

    @property
    def words(self) -> str:
        """The verdict as a sentence."""
        d = self.difference
        paired = f"{d.n:,} paired examples" if self.shared else "unpaired: they have seen other examples"
        interval = f"{d.signed}, {paired}"
        if d.low > 0:
            return f"B scores clearly higher on {self.task}: {interval}."
        if d.high < 0:
            return f"B scores clearly lower on {self.task}: {interval}."
        more = more_examples(d) if self.shared else None
        end = f"; about {more:,} {DECIDE}" if more else ""
        return f"No difference is shown on {self.task}: {interval}{end}."

    def to_json(self) -> dict[str, object]:
        """The comparison as JSON values."""
        return {
            "task": self.task,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "on_shared": self.on_shared and {"a": self.on_shared[0].to_json(), "b": self.on_shared[1].to_json()},
            "difference": self.difference.to_json(),
            "paired_examples": self.shared,
            "to_wrong": self.to_wrong,
            "to_right": self.to_right,
            "words": self.words,
        }


class Pairing:
    """Which examples of two studies are the same: those with the same id, question, answers and image."""

    def __init__(self, a: Study, b: Study) -> None:
        self.a, self.b = a, b
        self.same_study = a.path.resolve() == b.path.resolve()
        model = [(study.meta.get("fingerprint"), study.meta.get("dtype")) for study in (a, b)]
        self.same_model = self.same_study or (model[0] == model[1] and model[0][0] is not None)
        self._asked: tuple[Questions, Questions] | None = None

    def paired(self, a: pd.DataFrame, b: pd.DataFrame, task: str, *, itself: bool = False) -> Paired:
        """Both sides' scores on a task, and their difference; `itself`: they are of one plan of one model.

        Where that has given the same answers twice, there is no difference to estimate.
        """
        ours, theirs = a[a["task"] == task], b[b["task"] == task]
        both = ours.merge(theirs, on="example", suffixes=("_a", ""))
        both = both[[self.is_same(task, str(name)) for name in both["example"]]] if not self.same_study else both
        means = summarize(ours["score"], ours["cluster"]), summarize(theirs["score"], theirs["cluster"])
        if not len(both):
            return Paired(task, *means, independent_difference(*means), None, 0, 0)
        on_shared = summarize(both["score_a"], both["cluster"]), summarize(both["score"], both["cluster"])
        same = itself and all(both[f"{column}_a"].equals(both[column]) for column in ("score", "answer"))
        difference = paired_difference(both["score"], both["score_a"], both["cluster"], itself=same)
        worse, better = (both["score"] < both["score_a"]).sum(), (both["score"] > both["score_a"]).sum()
        return Paired(task, *means, difference, on_shared, int(worse), int(better))

    def is_same(self, task: str, example: str) -> bool:
        """Whether an example of both studies is the same question about the same image."""
        if self.same_study or self._data(self.a, task) == self._data(self.b, task) is not None:
            return True
        if self._asked is None:
            self._asked = read_questions(self.a.path, self.a.meta), read_questions(self.b.path, self.b.meta)
        ours, theirs = (asked.get((task, example)) for asked in self._asked)
        return ours is not None and theirs is not None and _identity(ours) == _identity(theirs)

    @staticmethod
    def _data(study: Study, task: str) -> str | None:
        """The fingerprint of a task's examples, if the study recorded one."""
        return study.meta.get("data", {}).get(task)


def _identity(asked: Question) -> tuple[object, ...]:
    """What makes two questions the same."""
    # of an image its name alone: the same data set may lie in another folder
    return asked.prompt, asked.answers, tuple(file and file.name for file in asked.images)
