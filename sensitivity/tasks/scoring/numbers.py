"""Answers that are numbers: right within a tolerance, as in ChartQA's relaxed accuracy."""

from __future__ import annotations

import re

from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Task

TOLERANCE = 0.05  # of the right number: ChartQA's (Masry et al. 2022, section 5.1)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # with thousands separators, or without
_NUMBER = re.compile(rf"(?:(?<![\d.])[-+−])?(?:{_DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def task(name: str, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> Task:
    """1 if the last number in an answer is within 5 % of a right one; a right 0 must be met exactly."""
    for example in examples:
        if wrong := [one for one in example.answers if number(one) is None]:
            raise UserError(
                f"example {example.id} of {name} is answered with {wrong[0]!r}, which is no number; number: is for "
                "answers such as 12, -3.5, 1,200 or 40%"
            )
    return Task(name, examples, score, notes=notes, readable=lambda answer: number(answer) is not None)


def score(answer: str, example: Example) -> float:
    """1 if the answer's number is within the tolerance of a right one."""
    given = number(answer)
    if given is None:
        return 0.0
    right = [value for one in example.answers if (value := number(one)) is not None]
    return float(any(abs(given - value) <= TOLERANCE * abs(value) for value in right))


def number(text: str) -> float | None:
    """The last number in a text, or None if there is none; thousands separators and a percent sign are allowed."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None
