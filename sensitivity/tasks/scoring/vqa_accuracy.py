"""The official VQA accuracy with its normalization, and exact match after the same normalization (GQA)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sensitivity.tasks.examples.types import Example

# Everything here follows the evaluation code of visualqa.org, its bugs included, so that figures are comparable.

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS.split())}
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # at most so many are removed: the official code passes re.UNICODE (32) where sub() takes a count

_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _misspelled(word: str) -> Iterator[str]:
    """A contraction without one of its apostrophes, in each possible way."""
    return (word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'")


# the official table has one entry the other way round: it removes the apostrophe of somebody'd
_SPELLING = {wrong: word for word in _CONTRACTIONS.split() for wrong in _misspelled(word)} | {"somebody'd": "somebodyd"}


def normalized(text: str) -> str:
    """Text without punctuation and articles, with digits for numbers up to ten and apostrophes in contractions."""
    plain = text
    for mark in _PUNCTUATION:
        # as in the official code: a mark is deleted if it stands beside a space anywhere in the text, or if a number
        # has a thousands separator; otherwise it becomes a space
        edge = f"{mark} " in text or f" {mark}" in text or _THOUSANDS.search(text)
        plain = plain.replace(mark, "" if edge else " ")
    plain = _FULL_STOP.sub("", plain, count=_FULL_STOPS)
    words = (_DIGITS.get(word, word) for word in plain.lower().split())
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, example: Example) -> float:
    """min(1, matches among the other people's answers / 3), averaged over leaving out each person (ten in VQAv2)."""
    return _agreement(normalized(_flat(answer)), [normalized(_flat(one)) for one in example.answers])


def verbatim(answer: str, example: Example) -> float:
    """The official script's accuracy: where all people agree, nothing is normalized, so that Yes is not yes.

    People who send answers to the evaluation server therefore normalize them first. Models that write lower case
    without full stops score the same under both.
    """
    given, right = _flat(answer), [_flat(one) for one in example.answers]
    return accuracy(answer, example) if len(set(right)) > 1 else _agreement(given, right)


def _agreement(given: str, right: Sequence[str]) -> float:
    matches = right.count(given)
    return sum(min(1.0, (matches - (one == given)) / 3) for one in right) / len(right)


def match(answer: str, example: Example) -> float:
    """1 if the answer equals a right one after normalization."""
    return float(normalized(_flat(answer)) in {normalized(_flat(one)) for one in example.answers})


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
