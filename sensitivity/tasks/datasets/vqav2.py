"""VQAv2: questions about COCO's val2014 images, with the answers of ten people each."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.fields import ANY_TEXT, COUNT, TEXT, WHOLE, Kind, list_of
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, Record, checked_records
from sensitivity.tasks.examples.types import SHORT_ANSWER, Example, Task, mean_of
from sensitivity.tasks.scoring import vqa_accuracy

QUESTION = {"question_id": WHOLE, "image_id": COUNT, "question": TEXT}
ANSWER = Kind("an answer in text", lambda value: isinstance(value, dict) and ANY_TEXT.fits(value.get("answer")))
ANNOTATION, MORE = {"question_id": WHOLE, "image_id": COUNT, "answers": list_of(ANSWER, 0)}, {"answer_type": TEXT}
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
GET = (
    "download v2_Questions_Val_mscoco.zip and v2_Annotations_Val_mscoco.zip from visualqa.org/download.html and "
    "val2014.zip from cocodataset.org, and unpack all there (the Train ones too, to calibrate on training images)"
)


def vqav2_questions(folder: Path, split: str, n: int, seed: int) -> Task:
    """The questions of VQAv2, scored by the official accuracy."""
    source = DatasetFolder("vqav2", folder, GET)
    part = source.part(split, ("val2014", "train2014"), (QUESTIONS, ANNOTATIONS, "{}"))
    source.file(part.name)
    script = {"official script": mean_of(vqa_accuracy.verbatim)}
    return source.questions(_rows, part, n, seed, vqa_accuracy.accuracy, metrics=script)


def _rows(source: DatasetFolder, part: str) -> Iterator[Example | Flaw]:
    """One example per question, with all people's answers, which come from the file of annotations."""
    answers_by_question = {
        # interned, to save memory: most of the millions of answers are the same few words
        one["question_id"]: (one["image_id"], sys.intern(one.get("answer_type") or "all"), _people(one))
        for one in checked_records(
            source.records(ANNOTATIONS.format(part), "annotations"), "an annotation", ANNOTATION, MORE
        )
    }
    seen = set()
    pictures: dict[int, tuple[str, Path]] = {}  # shared by all questions about an image, to save memory
    for question in checked_records(source.records(QUESTIONS.format(part), "questions"), "a question", QUESTION):
        name, image = str(question["question_id"]), question["image_id"]
        seen.add(question["question_id"])
        about, kind, right = answers_by_question.get(question["question_id"], (None, "", ()))
        if about is None:
            yield Flaw(name, "no annotation")
        elif about != image:
            yield Flaw(name, "annotated on another image")
        elif not right:
            yield Flaw(name, "no answers")
        else:
            if image not in pictures:
                pictures[image] = str(image), source.folder / part / f"COCO_{part}_{image:012d}.jpg"
            cluster, file = pictures[image]
            yield Example(name, cluster, kind, file, question["question"] + SHORT_ANSWER, right)
    for name in answers_by_question.keys() - seen:
        yield Flaw(str(name), "an annotation of no question")


def _people(annotation: Record) -> tuple[str, ...]:
    """All answers that are not blank, the most frequent first, since the likelihood of the first is measured."""
    given = [sys.intern(one["answer"].strip()) for one in annotation["answers"] if one["answer"].strip()]
    counts = Counter(given)
    return tuple(sorted(given, key=lambda answer: -counts[answer]))
