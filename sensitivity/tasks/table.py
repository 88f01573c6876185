"""TASKS, DATASETS and others: functions that make tasks, by name; find() returns the one of a name, task() calls it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path

from sensitivity.spec.errors import UserError, check_is, check_least, unknown
from sensitivity.tasks import retrieval, scene_tasks
from sensitivity.tasks.datasets import coco, geochat, gqa, image_pairs, rsvqa, scene_folders, vqav2
from sensitivity.tasks.examples.types import SPLITS, Task
from sensitivity.tasks.harness import lmms, task_files, vlmeval
from sensitivity.tasks.own import lines

TASKS: dict[str, Callable[[str, int, int], Task]] = {
    "vqa": scene_tasks.vqa,
    "caption": scene_tasks.caption,
    "scene": scene_tasks.scene,
    "ground": scene_tasks.ground,
}
# published data sets in a folder with their official layout: --task coco-captions:FOLDER
DATASETS: dict[str, Callable[[Path, str, int, int], Task]] = {
    "coco-captions": coco.coco_captions,
    "vqav2": vqav2.vqav2_questions,
    "gqa": gqa.gqa_questions,
    "rsvqa-lrben": rsvqa.lrben,
    "rsvqa-hrben": rsvqa.hrben,
    "aid": scene_folders.aid,
    "ucmerced": scene_folders.ucmerced,
    "geochat-grounding": geochat.geochat_boxes,
    "geochat-region-captions": geochat.region_captions,
    "levir-cd": image_pairs.levir_change,
    "levir-cc": image_pairs.levir_captions,
    "xbd": image_pairs.building_damage,
}
# retrieval, for models that compare images with texts; here `n` counts images
RETRIEVAL_TASKS: dict[str, Callable[[str, int, int], Task]] = {"retrieval": retrieval.scene_retrieval}
# published data sets for retrieval: --task flickr30k:FOLDER
RETRIEVAL_DATASETS: dict[str, Callable[[Path, str, int, int], Task]] = {"flickr30k": retrieval.flickr30k_task}
# tasks of an evaluation library, by the library's name: --task lmms-eval:TASK, or lmms-eval:TASK:FOLDER
LIBRARIES: dict[str, Callable[[str, str | None, str, int, int], Task]] = {
    "lmms-eval": lmms.lmms_eval,
    "vlmeval": vlmeval.vlmeval_task,
}
# checks of a task's name before any data are read
_CHECKS: dict[str, Callable[[str], object]] = {"lmms-eval": task_files.file_of, "vlmeval": vlmeval.check}
# an example of a task's name, for a message
_EXAMPLES = {"lmms-eval": "chartqa", "vlmeval": "MMStar"}


def task(name: str, split: str = "evaluation", n: int = 1000, seed: int = 0, whole: bool = False) -> Task:
    """A task by its name, DATASET:FOLDER, LIBRARY:TASK, or SCORER:PATH for a user's own data; `n` counts examples.

    With `whole`, answers are generated to their end even when they can no longer be right. It shows what a sweep would
    ask: `sweep` itself takes names.

    Examples:
        >>> from sensitivity import task
        >>> questions = task("vqa", n=20)
        >>> first = questions.examples[0]
        >>> questions.score(first.answers[0], first)
        1.0
    """
    named = _named(name, split, n, seed)
    return replace(named, exact=False) if whole else named


def retrieval_among(sources: Sequence[str]) -> set[str]:
    """The names of those tasks that rank images and captions among all others, instead of answering each example."""
    return {source.partition(":")[0] for source in sources} & {*RETRIEVAL_TASKS, *RETRIEVAL_DATASETS}


def missing(sources: Sequence[str]) -> Path | None:
    """The first file or folder of these tasks that is not there."""
    for source in sources:
        head, _, place = source.partition(":")
        if head in {**DATASETS, **RETRIEVAL_DATASETS, **lines.SCORERS} or (place := source).endswith(".jsonl"):
            path = Path(place).expanduser()
            if not path.exists():
                return path
    return None


def check_distinct(tasks: Sequence[Task], sources: Sequence[str]) -> None:
    """Raise an error if two tasks have the same name, or two examples of one the same id: scores are stored by both."""
    for i, (one, source) in enumerate(zip(tasks, sources, strict=True)):
        ids = Counter(example.id for example in one.examples)
        if not ids:
            raise UserError(f"{source} has no examples")
        if ids.total() > len(ids):
            raise UserError(f"{source} has the example {ids.most_common(1)[0][0]} twice; give each an id of its own")
        for other, earlier in zip(tasks[:i], sources, strict=False):
            if one.name == other.name:
                same = earlier.rpartition(":")[2] == source.rpartition(":")[2]
                remedy = "give one of them a copy of the file under another name" if same else "rename one of the files"
                raise UserError(f"{earlier} and {source} are both called {one.name}; {remedy}")


def _named(name: str, split: str, n: int, seed: int) -> Task:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    check_is("n", n, Integral)
    if n < 1:
        raise UserError(f"a task needs at least one example, not {n}")
    check_least("seed", seed, 0)
    return find(name)(split, n, seed)


def find(name: str) -> Callable[[str, int, int], Task]:
    """A function that makes the task of a name; no data are read before it is called."""
    check_is("a task", name, str)
    tasks, sets = {**TASKS, **RETRIEVAL_TASKS}, {**DATASETS, **RETRIEVAL_DATASETS}
    if name in tasks:
        return tasks[name]
    head, colon, folder = name.partition(":")
    if head in LIBRARIES and colon:
        return _of_library(head, folder)
    if head in sets:
        if not folder:
            raise UserError(f"{head} needs the folder where the data set is; type {head}:FOLDER")
        return partial(sets[head], Path(folder).expanduser())
    if colon and head in lines.SCORERS:
        return partial(lines.own_task, Path(folder).expanduser(), scorer=head)
    of_file = colon and (name.endswith(".jsonl") or os.path.exists(os.path.expanduser(folder)))
    if of_file and not os.path.exists(os.path.expanduser(name)):  # a file's name may have a colon
        raise unknown("scorer", head, lines.SCORERS)
    if name.endswith(".jsonl"):
        return partial(lines.own_task, Path(name).expanduser())
    owns = (*(f"{scorer}:PATH" for scorer in lines.SCORERS), "FILE.jsonl")
    libraries = (f"{library}:TASK" for library in LIBRARIES)
    raise unknown("task", name, [*tasks, *(f"{known}:FOLDER" for known in sets), *owns, *libraries])


def _of_library(library: str, named: str) -> Callable[[str, int, int], Task]:
    """A task of an evaluation library, with the folder of its data if one is named."""
    name, _, folder = named.partition(":")
    if not name:
        such = f"{library}:{_EXAMPLES[library]}"
        raise UserError(f"{library} needs the name of a task; type {library}:TASK, such as {such}")
    _CHECKS[library](name)
    return partial(LIBRARIES[library], name, str(Path(folder).expanduser()) if folder else None)
