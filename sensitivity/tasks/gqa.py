"""GQA: the balanced questions of test-dev, one answer each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity import tasks
from sensitivity.fields import ANY_TEXT, FILE_INSIDE, OBJECT, TEXT, Misfit, check, shown
from sensitivity.tasks import vqa_accuracy
from sensitivity.tasks.layout import Flaw, Source

QUESTIONS = "{}_balanced_questions.json"
QUESTION, MORE = {"imageId": FILE_INSIDE, "question": TEXT}, {"answer": ANY_TEXT, "types": OBJECT}
GET = (
    "download questions1.2.zip and images.zip from cs.stanford.edu/people/dorarad/gqa/download.html and unpack them, "
    "to have testdev_balanced_questions.json (val_balanced_questions.json too, to calibrate on) and images/ there"
)


def gqa(folder: Path, split: str, n: int, seed: int) -> tasks.Task:
    source = Source("gqa", folder, GET)
    part = source.part(split, ("testdev", "val", "train"), (QUESTIONS,))
    source.file("images")
    return source.questions(_rows, part, n, seed, vqa_accuracy.match)


def _rows(source: Source, part: str) -> Iterator[tasks.Example | Flaw]:
    every = source.json(QUESTIONS.format(part))
    if not isinstance(every, dict):
        raise Misfit(f"where the questions should stand in an object there is {shown(every)}")
    for name, question in every.items():
        check(question, QUESTION, MORE, "an entry")
        image, answer = question["imageId"], (question.get("answer") or "").strip()
        # verify, query, choose, logical, compare
        kind = check(question.get("types") or {}, {}, {"structural": TEXT}).get("structural") or "all"
        if not answer:
            yield Flaw(name, "no answer")
        else:
            file = source.folder / "images" / f"{image}.jpg"
            yield tasks.Example(name, image, kind, file, question["question"] + tasks.SHORT, (answer,))
