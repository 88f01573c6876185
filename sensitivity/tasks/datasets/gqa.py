"""GQA: the balanced questions of test-dev, with one answer each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.fields import ANY_TEXT, FILE_INSIDE, OBJECT, TEXT, InvalidValue, check, quoted
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw
from sensitivity.tasks.examples.types import SHORT_ANSWER, Example, Task
from sensitivity.tasks.scoring import vqa_accuracy

QUESTIONS = "{}_balanced_questions.json"
QUESTION, MORE = {"imageId": FILE_INSIDE, "question": TEXT}, {"answer": ANY_TEXT, "types": OBJECT}
GET = (
    "download questions1.2.zip and images.zip from cs.stanford.edu/people/dorarad/gqa/download.html and unpack them, "
    "to have testdev_balanced_questions.json (val_balanced_questions.json too, to calibrate on) and images/ there"
)


def gqa_questions(folder: Path, split: str, n: int, seed: int) -> Task:
    """The questions of GQA, scored by exact match after VQA's normalization."""
    source = DatasetFolder("gqa", folder, GET)
    part = source.part(split, ("testdev", "val", "train"), (QUESTIONS,))
    source.file("images")
    return source.questions(_rows, part, n, seed, vqa_accuracy.match)


def _rows(source: DatasetFolder, part: str) -> Iterator[Example | Flaw]:
    """One example per question."""
    every = source.json(QUESTIONS.format(part))
    if not isinstance(every, dict):
        raise InvalidValue(f"the questions should be an object, not {quoted(every)}")
    for name, question in every.items():
        check(question, QUESTION, MORE, "an entry")
        image, answer = question["imageId"], (question.get("answer") or "").strip()
        # the structural type of the question: verify, query, choose, logical or compare
        kind = check(question.get("types") or {}, {}, {"structural": TEXT}).get("structural") or "all"
        if not answer:
            yield Flaw(name, "no answer")
        else:
            file = source.folder / "images" / f"{image}.jpg"
            yield Example(name, image, kind, file, question["question"] + SHORT_ANSWER, (answer,))
