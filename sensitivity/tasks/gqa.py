"""GQA: the balanced questions of test-dev, one answer each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity import tasks
from sensitivity.tasks import vqa_accuracy
from sensitivity.tasks.layout import Flaw, Source

QUESTIONS = "{}_balanced_questions.json"
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
    for name, question in source.json(QUESTIONS.format(part)).items():
        image, answer = str(question["imageId"]), str(question.get("answer") or "").strip()
        kind = str(question.get("types", {}).get("structural", "all"))  # verify, query, choose, logical, compare
        if not answer:
            yield Flaw(name, "no answer")
        else:
            file = source.folder / "images" / f"{image}.jpg"
            yield tasks.Example(name, image, kind, file, question["question"] + tasks.SHORT, (answer,))
