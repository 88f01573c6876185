"""Multiple choice: an answer is the letter of an option, or the option's text."""

from __future__ import annotations

import re

from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Task

LETTERS = "ABCDEFGHIJ"
# "B", "(b)", "B.", "B: a cat", "The answer is B", "Option (B)", but not the article in "A cat" or the b of "blue"
_ALONE = re.compile(r"[(\[]?([A-Ja-j])[)\].:]*")
_FIRST = re.compile(r"[(\[]([A-Ja-j])[)\]]|([A-J])[).:](?:\s|$)")
_SAID = re.compile(r"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)\s*:?\s*[(\[]?([A-J])\b")


def task(name: str, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> Task:
    """1 if the chosen option is the right one; the chance level is that of always giving the commonest letter."""
    for example in examples:
        if not re.fullmatch(f"[{LETTERS}{LETTERS.lower()}]", example.answers[0]):
            raise UserError(
                f"example {example.id} of {name} is answered with {example.answers[0]!r}; in choice: the first answer "
                'is the letter of the right option, and its text may follow, such as "answers": ["B", "a cat"]'
            )
    return Task(name, examples, score, notes=notes, readable=lambda answer: letter(answer) is not None)


def score(answer: str, example: Example) -> float:
    """1 for the right letter or, if the answer names no letter, for the text of the right option."""
    if (given := letter(answer)) is not None:
        return float(given == example.answers[0].upper())
    return float(_plain(answer) in {_plain(one) for one in example.answers[1:]})


def letter(answer: str) -> str | None:
    """The letter of the option that an answer names, by the first of three rules that applies.

    The answer is only a letter; it begins with a letter in brackets, or with one before a full stop, bracket or colon;
    it names a letter after the word answer, option or choice.
    """
    text = answer.strip()
    if match := _ALONE.fullmatch(text):
        return match[1].upper()
    if match := _FIRST.match(text):
        return (match[1] or match[2]).upper()
    said = _SAID.findall(text)
    return said[-1].upper() if said else None


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .").split())
