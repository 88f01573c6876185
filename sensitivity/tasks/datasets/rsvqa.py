"""RSVQA in low and high resolution: questions about presence, comparison, and rural or urban areas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.fields import ANY_TEXT, FLAG, TEXT, WHOLE, check
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, checked_records
from sensitivity.tasks.examples.types import SHORT_ANSWER, Example, Task
from sensitivity.tasks.scoring.answer_text import equals_squeezed
from sensitivity.tasks.scoring.by_kind import accuracies_by_kind

KINDS = ("presence", "comp", "rural_urban")  # as in GeoChat's tables; the files also ask about count and area
STATE = {"active": FLAG}
ANSWER = {"question_id": WHOLE, "answer": ANY_TEXT}
QUESTION = {"id": WHOLE, "img_id": WHOLE, "type": TEXT, "question": TEXT}
GET_LR = "download all files of zenodo.org/records/6344334 and unpack Images_LR.zip there"
GET_HR = "download all files of zenodo.org/records/6344367 and unpack Images.tar (a folder Data) there"


def lrben(folder: Path, split: str, n: int, seed: int) -> Task:
    """RSVQA in low resolution, its test split."""
    return _task(
        DatasetFolder("rsvqa-lrben", folder, GET_LR), "LR_split_{}", ("test", "train"), "Images_LR", split, n, seed
    )


def hrben(folder: Path, split: str, n: int, seed: int) -> Task:
    """RSVQA in high resolution, its second test split (Philadelphia), which GeoChat-Bench uses."""
    source = DatasetFolder("rsvqa-hrben", folder, GET_HR)
    return _task(source, "USGS_split_{}", ("test_phili", "train"), "Data", split, n, seed)


def _task(
    source: DatasetFolder, prefix: str, parts: tuple[str, str], images: str, split: str, n: int, seed: int
) -> Task:
    part = source.part(split, parts, (f"{prefix}_questions.json", f"{prefix}_answers.json"))
    source.file(images)
    rows = _rows(source, prefix.format(part.name), source.folder / images)
    examples, notes = source.drawn_examples(rows, part, n, seed)
    return Task(
        source.name, examples, equals_squeezed, max_new_tokens=10, metrics=accuracies_by_kind(examples), notes=notes
    )


def _rows(source: DatasetFolder, prefix: str, images: Path) -> Iterator[Example | Flaw]:
    """One example per active question of the scored kinds; inactive ones belong to other splits or were withdrawn."""
    answers_by_question = {}
    for one in checked_records(source.records(f"{prefix}_answers.json", "answers"), "an answer", {}, STATE):
        if one.get("active"):  # withdrawn answers stay in the files as an id alone
            check(one, ANSWER, {}, "an answer")
            answers_by_question[one["question_id"]] = one["answer"].strip()
    for question in checked_records(source.records(f"{prefix}_questions.json", "questions"), "a question", {}, STATE):
        if not question.get("active"):
            continue
        if check(question, QUESTION, {}, "a question")["type"] not in KINDS:
            continue
        name, image = str(question["id"]), str(question["img_id"])
        if not answers_by_question.get(question["id"]):
            yield Flaw(name, "no answer")
        else:
            prompt = question["question"] + SHORT_ANSWER
            yield Example(
                name, image, question["type"], images / f"{image}.tif", prompt, (answers_by_question[question["id"]],)
            )
