"""A gallery for a page: the changed examples of one plan as cards, with counts, and what could not be shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sensitivity.analysis.failures.changes import Change, changes, study_of
from sensitivity.analysis.failures.pictures import Picture, Pictures
from sensitivity.spec.plan import Plan
from sensitivity.study.counting import count
from sensitivity.study.examples.questions import questions
from sensitivity.study.study import Study

LONGEST = 400  # characters of a question or an answer on a card


@dataclass(frozen=True)
class Card:
    """One changed example, and its pictures."""

    change: Change
    pictures: tuple[Picture, ...]

    @property
    def boxed(self) -> bool:
        """Whether boxes are drawn."""
        return any(picture.boxes for picture in self.pictures)


@dataclass(frozen=True)
class Gallery:
    """The changed examples of a plan that are shown, and counts over all of its examples."""

    title: str
    plan: Plan
    base: str  # what the plan is compared with
    counts: tuple[dict[str, object], ...]
    changed: int
    cards: tuple[Card, ...]
    notes: tuple[str, ...]
    other: str = "this plan"

    @property
    def kinds(self) -> list[str]:
        """The kinds of question among the cards."""
        return sorted({card.change.kind for card in self.cards})


def galleries(
    study: Study, plans: Iterable[tuple[str, Plan]], most: int, task: str = "", kind: str = ""
) -> list[Gallery]:
    """A gallery for each plan, against full precision, of at most so many examples; plans come with a title.

    The answers are those of the verification on fresh examples where a plan was verified.
    """
    known: dict[str, Pictures] = {}
    made = []
    for title, plan in plans:
        where = study_of(study, plan)
        pictures = known.setdefault(str(where.path), Pictures(where.meta))
        made.append(gallery(title, where, plan, pictures, most, task, kind))
    return made


def gallery(
    title: str, study: Study, plan: Plan, pictures: Pictures | None, most: int, task: str = "", kind: str = ""
) -> Gallery:
    """The gallery of a plan of the study that has its answers; without pictures where none are wanted."""
    after, before = study.examples(plan), study.examples(study.native)
    assert after is not None, "study_of has found it"
    assert before is not None, "and full precision"
    every = changes(after, before, questions(study.path, study.meta), task, kind)
    cards = [Card(one, tuple(pictures.of(one)) if pictures else ()) for one in every[:most]]
    counts = [row for row in study.counts_by_kind(plan) if (not task or row["task"] == task)]
    # a task of one kind is counted as a whole alone
    counts = [row for row in counts if not kind or row["kind"] == kind] or counts
    notes = tuple(notes_on(cards)) if pictures else ()
    return Gallery(title, plan, "full precision", tuple(counts), len(every), tuple(cards), notes)


def notes_on(cards: Sequence[Card]) -> list[str]:
    """What could not be shown."""
    notes = []
    if lost := [card.change for card in cards if not card.pictures]:
        file = next((one for change in lost if change.question for one in change.question.images if one), None)
        where = f" (such as {file})" if file else "; the study's data are not where they were, or were changed"
        notes.append(f"The images of {count(len(lost), 'example')} were not found{where}: they are shown as text.")
    if any(card.change.question is None for card in cards):
        notes.append("Questions and right answers are not known: the study has not kept them, and its data are gone.")
    return notes


def shortened(text: str) -> str:
    """A text that fits on a card."""
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST else f"{flat[:LONGEST]}…"
