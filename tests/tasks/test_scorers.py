"""Scorers of a user's own lines: choices, numbers, ANLS, yes and no, recall of boxes; each by hand-made cases."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.own.lines import BOXED, SCORERS, own_task
from sensitivity.tasks.scoring import anls, choices, numbers
from sensitivity.tasks.table import task


def own(folder: Path, scorer: str, *lines: dict[str, Any]) -> Task:
    Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(folder / "a.png")
    asked = [{"image": "a.png", "prompt": "?", **line} for line in lines]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return task(f"{scorer}:{folder / 'q.jsonl'}")


def test_only_an_exact_match_may_end_an_answer_early(tmp_path: Path) -> None:
    """An answer that no longer begins like a right one cannot match, but may still please any other rule."""
    lines = [{"answers": ["a cat"], "split": "evaluation"}]
    assert own(tmp_path, "exact", *lines).exact
    assert task(str(tmp_path / "q.jsonl")).exact
    assert not task(str(tmp_path / "q.jsonl"), whole=True).exact
    assert not own_task(
        tmp_path / "q.jsonl", "evaluation", 5, 0, score=lambda answer, example: float("cat" in answer)
    ).exact
    for scorer in set(SCORERS) - {"exact", *BOXED}:
        more = {
            "answers": {"choice": ["b", "a cat"], "number": ["3"], "yesno": ["yes"], "vqa": ["a"] * 10}.get(scorer, "a")
        }
        assert not own(tmp_path, scorer, more).exact, scorer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), (" (B) ", "B"), ("B.", "B"), ("[b]", "B"), ("B) a cat", "B"), ("B: a cat", "B"),
        ("(c) blue", "C"), ("The answer is B", "B"), ("Answer: (D).", "D"), ("option C is right", "C"),
        ("I think the choice is A.", "A"), ("The answer is not A; the answer is C", "C"),
        ("A cat", None), ("blue", None), ("a dog", None), ("", None), ("I see a cat", None), ("Because", None),
    ],
)  # fmt: skip
def test_the_letter_of_an_option(answer: str, letter: str | None) -> None:
    assert choices.letter(answer) == letter


def test_multiple_choice(tmp_path: Path) -> None:
    found = own(tmp_path, "choice", {"answers": ["b", "a cat"]})
    (example,) = found.examples
    assert [found.score(text, example) for text in ("B", "(b)", "A cat.", "C", "C. a cat", "a dog")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    said = [(text, found.score(text, example)) for text in ("B", "C", "a cat", "a dog")]
    assert [found.is_malformed(text, score) for text, score in said] == [False, False, False, True]
    with pytest.raises(UserError, match=r"is answered with 'a cat'; in choice: the first answer is the letter"):
        own(tmp_path, "choice", {"answers": ["a cat"]})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3.5", -3.5), ("1,234,567.5", 1234567.5), ("40%", 40), ("about 7 of them", 7), (".5", 0.5),
        ("3.", 3), ("10-20", 20), ("1e3", 1000), ("2, 3", 3), ("from 10 to 20", 20), ("−4", -4), ("1,23", 23),
        ("no number", None), ("", None), ("12 cats and 3 dogs.", 3), ("$1,200.", 1200), ("9" * 400, math.inf),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text: str, value: float | None) -> None:
    assert numbers.number(text) == value


def test_numbers_are_right_within_a_twentieth(tmp_path: Path) -> None:
    found = own(tmp_path, "number", {"answers": ["200"]}, {"answers": ["0"]}, {"answers": ["-10", "7"]})
    large, zero, two = found.examples
    assert [found.score(text, large) for text in ("190", "210", "189.9", "210.1", "two", "-200")] == [1, 1, 0, 0, 0, 0]
    assert [found.score(text, zero) for text in ("0", "0.0", "0.001")] == [1, 1, 0]
    assert [found.score(text, two) for text in ("-10.5", "7.3", "8")] == [1, 1, 0]
    assert not found.readable("two")
    with pytest.raises(UserError, match=r"is answered with 'many', which is no number"):
        own(tmp_path, "number", {"answers": ["many"]})


@given(st.text("ab", max_size=7), st.text("abc", max_size=7))
def test_the_edit_distance_is_that_of_the_definition(a: str, b: str) -> None:
    @cache
    def plain(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(plain(i - 1, j) + 1, plain(i, j - 1) + 1, plain(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert anls.distance(a, b) == plain(len(a), len(b))


def test_anls(tmp_path: Path) -> None:
    found = own(tmp_path, "anls", {"answers": ["Tuesday", "12 May"]})
    (example,) = found.examples
    assert found.score("tuesday", example) == 1
    assert found.score("tuesdey", example) == pytest.approx(6 / 7)
    assert found.score("12  MAY", example) == 1
    assert found.score("Sunday", example) == pytest.approx(4 / 7)  # u-s-n-d-a-y against t-u-e-s-d-a-y: three edits
    assert found.score("friday", example) == 0  # four edits of seven letters
    assert found.score("", example) == 0
    assert found.score("x" * 100_000, example) == 0


def test_yes_and_no_with_f1(tmp_path: Path) -> None:
    lines = [{"answers": [right]} for right in ("yes", "yes", "no", "no", "Yes")]
    found = own(tmp_path, "yesno", *lines)
    answers = ["Yes, it is.", "no", "yes", "No.", "maybe"]
    assert [found.score(a, e) for a, e in zip(answers, found.examples, strict=True)] == [1, 0, 0, 1, 0]
    assert [found.readable(a) for a in answers] == [True] * 4 + [False]
    assert found.measure(answers) == pytest.approx({"F1": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "yes": 2 / 5})
    assert not found.readable("nothing yesterday")
    with pytest.raises(UserError, match="in yesno: the answer is yes or no"):
        own(tmp_path, "yesno", {"answers": ["maybe"]})


def test_recall_of_boxes(tmp_path: Path) -> None:
    found = own(tmp_path, "recall", {"boxes": [[10, 10, 30, 40], [50, 10, 90, 40]]}, {"boxes": [[0, 0, 20, 20]]})
    both, one = found.examples
    right = both.answers[0]
    assert found.score(right, both) == 1
    assert found.score(right + "{<1><1><9><9>|<0>}" * 9, both) == 1
    assert found.score(one.answers[0], both) == 0
    assert found.score(right[: right.index("}") + 1], both) == 0.5
    assert not found.readable("it is on the left")
    assert found.measure([right + one.answers[0], ""])["precision"] == pytest.approx(2 / 3)
    assert math.isnan(found.measure(["", ""])["precision"])
