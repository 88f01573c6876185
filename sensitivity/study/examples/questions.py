"""What was asked: questions, right answers, boxes and image files of a study's examples, kept beside its answers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import pandas as pd

from sensitivity.spec.errors import Notice, UserError, reason
from sensitivity.spec.files import replacing
from sensitivity.study.storage import paths
from sensitivity.tasks.examples.types import Example, Regions, Task
from sensitivity.tasks.table import task as find_task

COLUMNS = ("task", "example", "prompt", "answers", "images", "boxes")


@dataclass(frozen=True)
class Question:
    """What was asked in one example; an image that is not a file of its own is None."""

    prompt: str
    answers: tuple[str, ...]
    images: tuple[Path | None, ...]
    regions: Regions | None


Questions = dict[tuple[str, str], Question]  # by task and example


def store(study: Path, tasks: Iterable[Task]) -> None:
    """Write the questions of a study's tasks, unless that was done: their data may be moved or changed later."""
    file = paths.questions_file(study)
    if not file.exists():
        frame = pd.DataFrame([_row(task, one) for task in tasks for one in task.examples], columns=list(COLUMNS))
        with replacing(file) as unfinished:
            frame.to_parquet(unfinished, index=False)


def read_questions(study: Path, meta: Mapping[str, object]) -> Questions:
    """The questions of a study: from their file, else (earlier versions) from its data; empty if those are gone."""
    file = paths.questions_file(study)
    if file.exists():
        try:
            return dict(_read(pd.read_parquet(file, use_threads=False)))
        except Exception as error:  # pyarrow raises errors of many types on damaged bytes
            warnings.warn(f"{file} is damaged ({reason(error)}); questions are read anew", Notice, stacklevel=2)
    return {(task.name, one.id): _question(one) for task in tasks_of(meta) for one in task.examples}


def tasks_of(meta: Mapping[str, object]) -> list[Task]:
    """The tasks that a study's metadata name, without those whose data are gone or were changed."""
    asked = cast(_Asked, meta)
    unchanged: list[Task] = []
    for name in asked["tasks"] if _Asked.__required_keys__ <= set(meta) else ():
        try:
            task = find_task(name, "evaluation", asked["n"], asked["seed"])
            if asked["data"].get(task.name) == f"{len(task.examples)} examples {task.fingerprint}":
                unchanged.append(task)
        except (UserError, OSError):  # the data were moved or changed, which the caller reports
            continue
    return unchanged


class _Asked(TypedDict):
    """What is used of a study's metadata; an imported table has no such fields."""

    tasks: list[str]
    n: int
    seed: int
    data: dict[str, str]


def _row(task: Task, example: Example) -> tuple[str | None, ...]:
    """The values of COLUMNS; lists are stored as JSON, which also holds file names that are not UTF-8."""
    asked = _question(example)
    regions, images = asked.regions, [None if file is None else str(file) for file in asked.images]
    boxes = None if regions is None else json.dumps([regions.width, regions.height, regions.polygons])
    return task.name, example.id, asked.prompt, json.dumps(asked.answers), json.dumps(images), boxes


def _question(example: Example) -> Question:
    # absolute, since a task may be named relative to the folder in which the sweep was started
    files = tuple(Path(os.path.abspath(one)) if isinstance(one, Path) else None for one in example.images)
    turns = "".join(f"{prompt}\n→ {answer}\n" for prompt, answer in example.turns)
    return Question(turns + example.prompt, example.answers, files, example.regions)


def _read(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, str], Question]]:
    for task, example, prompt, answers, images, boxes in frame[list(COLUMNS)].itertuples(index=False):
        regions = None
        if isinstance(boxes, str):  # a missing one is None or NaN, depending on the other rows
            width, height, polygons = json.loads(boxes)
            regions = Regions(width, height, tuple(tuple((x, y) for x, y in one) for one in polygons))
        files = tuple(None if file is None else Path(file) for file in json.loads(images))
        yield (task, example), Question(prompt, tuple(json.loads(answers)), files, regions)
