"""A gallery for a page: the changed examples of one plan as cards, with counts, and what could not be shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sensitivity.analysis.failures.causes import NO_PART, Cause, cause, put_back, tally
from sensitivity.analysis.failures.changes import Change, changed_answers, study_of
from sensitivity.analysis.failures.damage_places import DamagePlaces, Explained, examples_of, explanations_of
from sensitivity.analysis.failures.pictures import Picture, Pictures, picture
from sensitivity.spec.errors import shell_word, unknown
from sensitivity.spec.plan import KEY_LENGTH, Plan
from sensitivity.study.counting import count
from sensitivity.study.examples.questions import read_questions
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import retrieval_among

MAX_EXPLAINED = 6  # calibration examples that are shown
SHOWN, MOST = 20, 1_000  # examples, of which as many causes are measured: by default, and at most
MAX_TEXT = 400  # characters of a question or an answer on a card


@dataclass(frozen=True)
class Card:
    """One changed example, and its pictures."""

    change: Change
    pictures: tuple[Picture, ...]
    cause: Cause | None = None  # None: its score did not fall, or no cause was measured
    places: DamagePlaces | None = None  # where the damage enters, if `explain` was run on this example

    @property
    def boxed(self) -> bool:
        """Whether boxes are drawn."""
        return any(picture.boxes for picture in self.pictures)


@dataclass(frozen=True)
class ExplainedCard:
    """A calibration example that was explained, with its picture."""

    example: Example
    picture: Picture
    places: DamagePlaces


@dataclass(frozen=True)
class FailureGallery:
    """The changed examples of a plan that are shown, and counts over all of its examples."""

    title: str
    plan: Plan
    base: str  # what the plan is compared with
    counts: tuple[dict[str, object], ...]
    changed: int
    cards: tuple[Card, ...]
    notes: tuple[str, ...]
    other: str = "this plan"
    order: str = "those that cost most first"
    causes: tuple[tuple[str, int], ...] = ()  # how many answers each part mends, over all examples
    unexplained: int = 0  # how many answers got worse without a measured cause, where one could be measured
    ask: str = ""  # the command that measures their causes
    part: str = ""  # only answers that this part mends are shown
    explained: tuple[Explained, ...] = ()
    calibration: tuple[ExplainedCard, ...] = ()

    @property
    def both_ways(self) -> bool:
        """Whether neither plan is full precision, so that losses and gains stand side by side."""
        return self.base == "A"

    @property
    def filters(self) -> list[tuple[str, str, list[str]]]:
        """Filters for the cards: a title, the data attribute by which they filter, and its values."""
        kinds = sorted({card.change.kind for card in self.cards})
        parts = sorted({card.cause.name for card in self.cards if card.cause})
        every = [("Kind of question", "kind", kinds), ("Mended by", "part", parts)]
        if self.both_ways:
            directions = {card.change.direction for card in self.cards}
            every.append((f"Score of {self.other}", "direction", sorted(directions)))
        return [one for one in every if len(one[2]) > 1]


def galleries(
    study: Study, plans: Iterable[tuple[str, Plan]], most: int, task: str = "", kind: str = ""
) -> list[FailureGallery]:
    """A gallery for each plan, against full precision, of at most so many examples; plans come with a title.

    The answers are those of the verification on fresh examples where a plan was verified.
    """
    known: dict[str, Pictures] = {}
    made = []
    for title, plan in plans:
        where = study_of(study, plan)
        pictures = known.setdefault(str(where.path), Pictures(where.meta))
        made.append(gallery_of(title, where, plan, pictures, most, task, kind, home=study.path))
    return made


def gallery_of(
    title: str,
    study: Study,
    plan: Plan,
    pictures: Pictures | None,
    most: int,
    task: str = "",
    kind: str = "",
    part: str = "",
    home: Path | None = None,
) -> FailureGallery:
    """The gallery of a plan of the study that has its answers; without pictures where none are wanted.

    `home` is the folder of the study that was swept, if the answers are those of its verification. With `part`, only
    answers that this part mends are shown.
    """
    if part and part not in (*study.parts.names, NO_PART):
        raise unknown("part", part, (*study.parts.names, NO_PART))
    every, parts = changed(study, plan, task, kind), put_back(study, plan)
    causes = [cause(one, parts) for one in every]
    shown = [pair for pair in zip(every, causes, strict=True) if not part or (pair[1] and pair[1].name == part)]
    known = explanations_of(home or study.path, plan) if pictures else []
    of_failures = [one for one in known if one.of_failures]

    def places(change: Change) -> DamagePlaces | None:
        return next(filter(None, (one.places_in(change.task, change.example) for one in of_failures)), None)

    cards = tuple(Card(one, tuple(pictures.of(one)) if pictures else (), why, places(one)) for one, why in shown[:most])
    counts = [row for row in study.counts_by_kind(plan) if (not task or row["task"] == task)]
    # a task with one kind of question has no row for the kind
    counts = [row for row in counts if not kind or row["kind"] == kind] or counts
    notes = tuple(notes_on(cards)) if pictures else ()
    ranked = retrieval_among(study.meta.get("tasks", ()))  # no single one of its examples can be run again
    worse = [why for one, why in zip(every, causes, strict=True) if one.cost > 0 and one.task not in ranked]
    unexplained = worse.count(None)
    ask = _asks_causes(home or study.path, plan, task, kind, len(worse)) if len(worse) - unexplained < MOST else ""
    return FailureGallery(
        title, plan, "full precision", tuple(counts), len(shown), cards, notes, causes=tuple(tally(causes)),
        unexplained=unexplained, ask=ask, part=part,
        explained=tuple(known), calibration=tuple(_calibration_cards(known)),
    )  # fmt: skip


def _asks_causes(home: Path, plan: Plan, task: str, kind: str, worse: int) -> str:
    """The command that measures which part mends each of so many answers that got worse, the first MOST at most."""
    given = {"--task": task, "--kind": kind, "--n": min(worse, MOST) if worse > SHOWN else 0}
    typed = "".join(f" {flag} {shell_word(value)}" for flag, value in given.items() if value)
    return f"sensitivity failures {shell_word(home)} --plan {plan.key[:KEY_LENGTH]}{typed} --causes"


def _calibration_cards(known: Sequence[Explained]) -> Iterator[ExplainedCard]:
    """The calibration examples that a plan damages most, if they were explained and their images are found."""
    for one in known:
        if not one.of_failures:
            worst = sorted(examples_of(one), key=lambda pair: -pair[1].damage)[:MAX_EXPLAINED]
            for example, places in worst:
                if (shown := picture(example.image)) is not None:
                    yield ExplainedCard(example, shown, places)


def changed(study: Study, plan: Plan, task: str = "", kind: str = "") -> list[Change]:
    """The examples that a plan answers differently from full precision, in the study that has its answers."""
    after, before = study.examples(plan), study.examples(study.native)
    assert after is not None, "study_of has found the plan's answers"
    assert before is not None, "study_of has found full precision's answers"
    return changed_answers(after, before, read_questions(study.path, study.meta), task, kind)


def notes_on(cards: Sequence[Card]) -> list[str]:
    """Sentences on what could not be shown."""
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
    return flat if len(flat) <= MAX_TEXT else f"{flat[:MAX_TEXT]}…"
