"""Questions answered with yes or no, as in POPE: accuracy, with precision, recall and F1 of yes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Task

_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def task(name: str, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> Task:
    """1 for the right one of yes and no; the metrics are POPE's, where yes is the positive answer."""
    for example in examples:
        said = {says_yes(answer) for answer in example.answers}
        if len(said) > 1 or None in said:
            given = " and ".join(map(repr, example.answers))
            raise UserError(
                f"example {example.id} of {name} is answered with {given}; in yesno: the answer is yes or no, and one "
                "of them alone"
            )
    metrics = {"F1": f1, "precision": precision, "recall": recall, "yes": share_of_yes}
    return Task(
        name, examples, score, metrics=metrics, notes=notes, readable=lambda answer: says_yes(answer) is not None
    )


def score(answer: str, example: Example) -> float:
    """1 if the first yes or no in the answer is the right one."""
    return float(says_yes(answer) == says_yes(example.answers[0]))


def says_yes(answer: str) -> bool | None:
    """Whether an answer says yes; None where it says neither."""
    match = _WORD.search(answer)
    return None if match is None else match[1].lower() == "yes"


def _counts(answers: Sequence[str], examples: Sequence[Example]) -> tuple[int, int, int]:
    """The number of examples rightly answered yes, of those answered yes, and of those whose right answer is yes."""
    pairs = [(says_yes(a) is True, says_yes(e.answers[0]) is True) for a, e in zip(answers, examples, strict=True)]
    return sum(a and b for a, b in pairs), sum(a for a, _ in pairs), sum(b for _, b in pairs)


def precision(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Of the examples that are answered yes, the share whose right answer is yes."""
    hits, given, _ = _counts(answers, examples)
    return hits / given if given else math.nan


def recall(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Of the examples whose right answer is yes, the share that is answered yes."""
    hits, _, right = _counts(answers, examples)
    return hits / right if right else math.nan


def f1(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """The harmonic mean of precision and recall."""
    hits, given, right = _counts(answers, examples)
    return 2 * hits / (given + right) if given + right else math.nan


def share_of_yes(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """The share of examples that are answered yes."""
    return _counts(answers, examples)[1] / len(examples)
