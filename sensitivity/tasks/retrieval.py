"""Retrieval between images and captions: scenes, and Flickr30k in Karpathy's splits; recall at 1, 5 and 10."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sensitivity.spec.fields import ANY_TEXT, FILE_INSIDE, TEXT, Kind, list_of
from sensitivity.tasks import scenes
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, checked_records
from sensitivity.tasks.examples.types import SPLITS, Example, Gallery, ImageSource, Metric, Task

GET = (
    "download dataset_flickr30k.json (Karpathy's splits, caption_datasets.zip of cs.stanford.edu/people/karpathy/"
    "deepimagesent) and the Flickr30k images (shannon.cs.illinois.edu/DenotationGraph), as flickr30k-images/ there"
)
FILE, IMAGES = "dataset_flickr30k.json", "flickr30k-images"
SENTENCE = Kind("a sentence", lambda value: isinstance(value, dict) and ANY_TEXT.fits(value.get("raw")))
LISTED = {"filename": FILE_INSIDE, "split": TEXT, "sentences": list_of(SENTENCE, 0)}
PARTS = {"evaluation": "test", "calibration": "train"}  # val stays free for choosing settings
RANKS = (1, 5, 10)
DIRECTIONS = ("text", "image")  # what is retrieved: the captions of an image, or the image of a caption
POOL = 256  # scenes from which one is retrieved


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and all their captions; `owner[j]` is the index of the image of caption j."""

    images: tuple[Path, ...]
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    notes: tuple[str, ...] = ()


def flickr30k(folder: Path, split: str = "evaluation", n: int = 1000, seed: int = 0) -> Pairs:
    """n images (by default all 1,000 of the test split) with all their captions."""
    assert split in SPLITS
    source = DatasetFolder("flickr30k", folder, GET)
    every = source.json(FILE, "images")["images"]
    source.file(IMAGES)
    part = source.part(split, ("test", "train"))
    examples, notes = source.drawn_examples(_rows(source, every, PARTS[split]), part, n, seed)
    captions = tuple(text for example in examples for text in example.answers)
    owner = tuple(index for index, example in enumerate(examples) for _ in example.answers)
    return Pairs(tuple(e.image for e in examples if isinstance(e.image, Path)), captions, owner, notes)


def _rows(source: DatasetFolder, every: object, part: str) -> Iterator[Example | Flaw]:
    for image in checked_records(every, "an image", LISTED):
        name = image["filename"]
        if image["split"] == part:
            texts = tuple(text for one in image["sentences"] if (text := one["raw"].strip()))
            file = source.folder / IMAGES / name
            yield Example(name, name, "caption", file, "", texts) if texts else Flaw(name, "no caption")


def flickr30k_task(folder: Path, split: str, n: int, seed: int) -> Task:
    """n images and all their captions in one pool; the 128 most similar candidates are re-ranked, as published."""
    pairs = flickr30k(folder, split, n, seed)
    captions: list[list[str]] = [[] for _ in pairs.images]
    for caption, image_index in zip(pairs.captions, pairs.owner, strict=True):
        captions[image_index].append(caption)
    names = [image.name for image in pairs.images]
    return _task("flickr30k", names, pairs.images, captions, Gallery(len(names), 128), pairs.notes)


def scene_retrieval(split: str, n: int, seed: int) -> Task:
    """n scenes with different captions, in pools of 256."""
    scene_of: dict[str, scenes.Scene] = {}
    index = 0
    while len(scene_of) < n:
        one = scenes.scene(split, seed, index)
        scene_of.setdefault(scenes.caption(one), one)
        index += 1
    names, images = [one.id for one in scene_of.values()], [one.image for one in scene_of.values()]
    return _task("retrieval", names, images, [[caption] for caption in scene_of], Gallery(POOL, 16), ())


def _task(
    name: str,
    names: Sequence[str],
    images: Sequence[NDArray[np.uint8] | ImageSource],
    captions: Sequence[Sequence[str]],
    gallery: Gallery,
    notes: tuple[str, ...],
) -> Task:
    """Each image retrieves its captions, each caption its image; an answer is the rank of the first right one."""
    examples = []
    for key, image, texts in zip(names, images, captions, strict=True):
        examples.append(Example(key, key, "text", image, "", tuple(texts)))
        examples += [Example(f"{key}-{j}", key, "image", image, one, (one,)) for j, one in enumerate(texts)]
    metrics = {f"{direction} R@{k}": _recall(direction, k) for direction in DIRECTIONS for k in RANKS}
    for direction in DIRECTIONS:
        metrics[f"{direction} mean"] = _mean([_recall(direction, k) for k in RANKS])
    metrics["mean"] = _mean([metrics[f"{direction} mean"] for direction in DIRECTIONS])
    return Task(name, tuple(examples), ranks_first, metrics=metrics, notes=notes, gallery=gallery)


def ranks_first(answer: str, example: Example) -> float:
    """1 if a right image or caption ranks first."""
    return float(answer == "1")


def _recall(direction: str, k: int) -> Metric:
    return lambda answers, examples: float(
        np.mean([int(answer) <= k for answer, e in zip(answers, examples, strict=True) if e.kind == direction])
    )


def _mean(metrics: Sequence[Metric]) -> Metric:
    return lambda answers, examples: float(np.mean([metric(answers, examples) for metric in metrics]))


def ranks(similarity: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rank of the best right column in each row, from 0; a NaN similarity ranks last.

    Wrong columns of equal similarity rank before it, so that a model gains nothing by ties.
    """
    values = np.where(np.isnan(similarity), -np.inf, similarity)
    best = np.where(right, values, -np.inf).max(axis=1, keepdims=True)
    return np.asarray(((values >= best) & ~right).sum(axis=1))


def reranked(similarity: ArrayLike, second_scores: ArrayLike, k: int) -> NDArray[np.float64]:
    """The sum of both models' scores for the k most similar of each row by the first model; the others rank last."""
    first, second = np.asarray(similarity, float), np.asarray(second_scores, float)
    order = np.argsort(-first, axis=1, kind="stable")[:, :k]
    result = np.full(first.shape, -100.0)  # the published code's score for all that are not re-ranked
    np.put_along_axis(result, order, np.take_along_axis(first + second, order, axis=1), axis=1)
    return result
