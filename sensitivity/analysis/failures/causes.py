"""Causes: the cheapest part of a plan that mends an answer when it gets its bits back; measured, never guessed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from sensitivity.analysis.failures.changes import Change
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.study import answers
from sensitivity.study.storage import paths
from sensitivity.study.study import Study

NO_PART = "no single part"
LIKE_FULL = 8  # bits from which on a part that mends nothing is taken to mend nothing at full precision either


@dataclass(frozen=True)
class Cause:
    """What mends an answer: one part with more bits, or no single part."""

    part: str | None  # None: every part was put back alone, and none of them is enough
    scheme: Scheme | None = None  # what the part was raised to; None: full precision
    bits: int = 0  # how many more are stored with it

    @property
    def name(self) -> str:
        """The part, or that there is none."""
        return self.part or NO_PART

    @property
    def bytes(self) -> float:
        """How many more bytes the part takes with what it was raised to."""
        return self.bits / 8

    @property
    def words(self) -> str:
        """The cause in words."""
        return self.name if self.scheme is None else f"{self.name} at {self.scheme.bits} bits"

    def to_json(self) -> dict[str, object]:
        """The cause as JSON values."""
        return {"part": self.part, "scheme": self.scheme and self.scheme.to_json(), "more_bytes": self.bytes}


@dataclass(frozen=True)
class MeasuredWidth:
    """A plan with more bits for one part, how many more it stores, and its scores by task and example."""

    plan: Plan
    bits: int
    scores: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class RestoredPart:
    """A part of a plan with more bits, the others unchanged: at full precision, or at wider widths of the study."""

    part: str
    bits: int  # how many more are stored with the part at full precision
    plan: Plan  # the part at full precision
    scores: tuple[MeasuredWidth, ...]  # the widest first

    def score(self, change: Change) -> tuple[MeasuredWidth, float] | None:
        """The widest of them that has seen an example, and its score there; None where none has."""
        name = change.task, change.example
        return next(((one, one.scores[name]) for one in self.scores if name in one.scores), None)

    def is_final(self, change: Change) -> bool:
        """Whether it is known if the part mends an example: full precision was measured, or fewer bits suffice."""
        known = self.score(change)
        return known is not None and (known[0].plan.key == self.plan.key or known[1] >= change.before.score)


def put_back(study: Study, plan: Plan) -> list[RestoredPart]:
    """Every quantized part of a plan with its bits put back, the part that is cheapest to store first."""
    own_bits, restored = size(study.parts, plan).bits, []
    measured = [(_differing(plan, trial.plan), trial.plan) for trial in study.measured()]
    for part, scheme in plan.schemes:
        if scheme is not None:
            native = Plan(tuple((name, None if name == part else one) for name, one in plan.schemes))
            others = [(one[part], one) for differing, one in measured if differing == [part]]
            wider = [(other.bits, one) for other, one in others if other is not None and other.bits > scheme.bits]
            plans = [native, *(one for _, one in sorted(wider, key=lambda pair: -pair[0]))]
            scores = tuple(
                MeasuredWidth(one, size(study.parts, one).bits - own_bits, known)
                for one in plans
                if (known := _scores(study, one))
            )
            restored.append(RestoredPart(part, size(study.parts, native).bits - own_bits, native, scores))
    return sorted(restored, key=lambda one: one.bits)


def cause(change: Change, parts: Sequence[RestoredPart]) -> Cause | None:
    """The cheapest part that mends an answer; None while that is not measured, or where no score fell.

    Parts are tried in their order, so an answer is blamed on a part only if every cheaper one is known to mend nothing.
    """
    if change.cost <= 0:
        return None
    for one in parts:
        known = one.score(change)
        if known is None:
            return None
        width, score = known
        scheme = width.plan[one.part]
        if score >= change.before.score:
            return Cause(one.part, scheme, width.bits)
        if scheme is not None and scheme.bits < LIKE_FULL:  # it may mend the answer at more bits
            return None
    return Cause(None)


def next_part(change: Change, parts: Sequence[RestoredPart]) -> RestoredPart | None:
    """The part to put back next to find the cause of a change; None where its cause is known for certain."""
    for one in parts if change.cost > 0 else ():
        if not one.is_final(change):
            return one
        if cause(change, [one]) != Cause(None):
            return None
    return None


def tally(causes: Sequence[Cause | None]) -> list[tuple[str, int]]:
    """How many answers each part mends, the most first; those that no single part mends come last."""
    parts = [one.name for one in causes if one is not None]
    return sorted(((part, parts.count(part)) for part in set(parts)), key=lambda row: (row[0] == NO_PART, -row[1], row))


def measured_answers(study: Study, plan: Plan) -> pd.DataFrame | None:
    """Answers of a plan that was run on examples that had failed; None where it was not, or the file is damaged."""
    with contextlib.suppress(answers.Damaged):  # running them again replaces it
        return answers.read(paths.put_back_file(study.path, plan.key))
    return None


def _scores(study: Study, plan: Plan) -> dict[tuple[str, str], float]:
    """The scores of a plan by task and example, from the study and from what was run to find causes."""
    frames = [frame for frame in (measured_answers(study, plan), study.examples(plan)) if frame is not None]
    return {(str(task), str(example)): float(score) for frame in frames for task, example, score in _rows(frame)}


def _rows(frame: pd.DataFrame) -> Iterator[tuple[object, object, float]]:
    """Task, example and score of each row."""
    return zip(frame["task"], frame["example"], frame["score"], strict=True)


def _differing(plan: Plan, other: Plan) -> list[str]:
    """The parts whose schemes differ between two plans."""
    return [name for name, scheme in plan.schemes if other[name] != scheme]
