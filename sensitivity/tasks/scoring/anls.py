"""ANLS of DocVQA: the similarity of an answer to a right one, letter by letter; below one half it counts as 0."""

from __future__ import annotations

from sensitivity.tasks.examples.types import Example, Task

THRESHOLD = 0.5  # Biten et al. 2019, Scene Text Visual Question Answering, section 3.3
MAX_LETTERS = 1000  # of a text that are compared: the edit distance takes time for each pair of letters


def task(name: str, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> Task:
    """A task scored by average normalized Levenshtein similarity."""
    return Task(name, examples, score, notes=notes)


def score(answer: str, example: Example) -> float:
    """The similarity to the most similar right answer; 0 where that is below the threshold."""
    best = max(similarity(answer, right) for right in example.answers)
    return best if best >= THRESHOLD else 0.0


def similarity(one: str, other: str) -> float:
    """1 minus the edit distance as a share of the longer text; case and repeated white space do not count."""
    a, b = (" ".join(text.lower().split())[:MAX_LETTERS] for text in (one, other))
    return 1.0 if a == b else 1 - distance(a, b) / max(len(a), len(b))


def distance(a: str, b: str) -> int:
    """The Levenshtein distance: the fewest letters to insert, remove or replace to turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
    return row[-1]
