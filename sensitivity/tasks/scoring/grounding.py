"""Tasks answered with boxes: each written box may match one true box if the two overlap enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sensitivity.spec.errors import UserError, reason, unknown
from sensitivity.spec.fields import NUMBER, Kind, list_of
from sensitivity.tasks.examples.images import opened_image
from sensitivity.tasks.examples.types import Example, Metric, Point, Regions, Task
from sensitivity.tasks.scoring.boxes import DECODINGS, convex, decoded, matches, polygon_iou, written

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag of rotation, and its values that swap width and height
MAX_NUMBERS = 1000  # numbers or corners of a box
MAX_NEW_TOKENS = 256
THRESHOLDS = (0.5, 0.25)  # of intersection over union; the first one decides the score


def _is_box(value: object) -> bool:
    if not isinstance(value, list) or not 3 <= len(value) <= MAX_NUMBERS:
        return False
    if all(map(NUMBER.fits, value)):
        return len(value) >= 4 and len(value) % 2 == 0
    return all(isinstance(point, list) and len(point) == 2 and all(map(NUMBER.fits, point)) for point in value)


BOX = Kind("boxes, each [x1, y1, x2, y2] or corners [[x, y], ...]", _is_box)
BOXES = list_of(BOX)


def task(
    name: str,
    examples: tuple[Example, ...],
    notes: tuple[str, ...] = (),
    decoding: str = "turned",
) -> Task:
    """The share of all true boxes that written boxes match one to one: acc@0.5, which is the score, and acc@0.25.

    Further metrics are `any_match`, and the accuracy if written boxes are read in another way.

    An example's score is its number of found boxes divided by the mean number of boxes per example. The mean over
    examples is then the published figure (found boxes / all boxes), but an example with many boxes can score above 1.
    """
    if decoding not in DECODINGS:
        raise unknown("decoding of boxes", decoding, DECODINGS)
    per_example = sum(len(_regions(e).polygons) for e in examples) / max(len(examples), 1)

    def score(answer: str, example: Example) -> float:
        return found(answer, example, THRESHOLDS[0], decoding) / per_example

    further: dict[str, Metric] = {f"acc@{at}": accuracy(at, decoding) for at in THRESHOLDS}
    further |= {f"any match@{at}": any_match(at, decoding) for at in THRESHOLDS}
    others = [other for other in DECODINGS if other != decoding]
    further |= {f"acc@{at}, read as {other}": accuracy(at, other) for other in others for at in THRESHOLDS}

    def readable(answer: str) -> bool:
        return bool(decoded(answer, 100, 100, decoding))

    return Task(name, examples, score, max_new_tokens=MAX_NEW_TOKENS, metrics=further, notes=notes, readable=readable)


def recall_task(name: str, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> Task:
    """The share of an example's true boxes that are found; wrong boxes cost nothing.

    Unlike in `task`, an image with many boxes counts as much as one with a single box, and scores lie from 0 to 1.
    The metric precision is the share of all written boxes that are right.
    """

    def score(answer: str, example: Example) -> float:
        return found(answer, example, THRESHOLDS[0]) / len(_regions(example).polygons)

    def readable(answer: str) -> bool:
        return bool(decoded(answer, 100, 100))

    metrics: dict[str, Metric] = {"precision": precision, f"acc@{THRESHOLDS[0]}": accuracy(THRESHOLDS[0])}
    return Task(name, examples, score, max_new_tokens=MAX_NEW_TOKENS, metrics=metrics, notes=notes, readable=readable)


def precision(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """The share of all written boxes that match a true one; NaN if none is written."""
    pairs = list(zip(answers, examples, strict=True))
    given = sum(len(decoded(a, _regions(e).width, _regions(e).height)) for a, e in pairs)
    return sum(found(a, e, THRESHOLDS[0]) for a, e in pairs) / given if given else math.nan


def found(answer: str, example: Example, threshold: float, decoding: str = "turned") -> int:
    """How many true boxes the boxes in an answer match, one to one."""
    right = _regions(example)
    return matches(decoded(answer, right.width, right.height, decoding), right.polygons, threshold)


def accuracy(threshold: float, decoding: str = "turned") -> Metric:
    """The share of all true boxes that the boxes in answers match."""

    def metric(answers: Sequence[str], examples: Sequence[Example]) -> float:
        hits = sum(found(a, e, threshold, decoding) for a, e in zip(answers, examples, strict=True))
        return hits / sum(len(_regions(e).polygons) for e in examples)

    return metric


def any_match(threshold: float, decoding: str = "turned") -> Metric:
    """The share of answers with a box that matches any true box, in case the published figures are that lenient."""

    def hit(answer: str, example: Example) -> bool:
        right = _regions(example)
        given = decoded(answer, right.width, right.height, decoding)
        return any(polygon_iou(one, other) >= threshold for one in given for other in right.polygons)

    def metric(answers: Sequence[str], examples: Sequence[Example]) -> float:
        return sum(hit(a, e) for a, e in zip(answers, examples, strict=True)) / len(examples)

    return metric


def with_image_size(example: Example) -> Example:
    """The example with the size of its upright image, read from the file's header, and its true boxes as text."""
    image, known = example.image, _regions(example)
    try:
        if isinstance(image, np.ndarray):
            height, width = image.shape[:2]
        else:
            with opened_image(image) as picture:
                width, height = picture.size
                if picture.getexif().get(ORIENTATION, 1) in SIDEWAYS:
                    width, height = height, width
    except Exception as error:  # on a damaged file, each of Pillow's readers has errors of its own
        raise UserError(f"cannot read the image {image}: {reason(error)}") from error
    text = "".join(written(polygon, width, height) for polygon in known.polygons)
    return replace(example, answers=example.answers or (text,), regions=Regions(width, height, known.polygons))


def beyond_image(example: Example) -> float:
    """By how many pixels a true box reaches beyond its image, at most; infinity where one lies completely outside."""
    known, farthest = _regions(example), 0.0
    for polygon in known.polygons:
        (left, right), (top, bottom) = ((min(ends), max(ends)) for ends in zip(*polygon, strict=True))
        if right <= 0 or bottom <= 0 or left >= known.width or top >= known.height:
            return math.inf
        farthest = max(farthest, -left, -top, right - known.width, bottom - known.height)
    return farthest


def is_inverted(box: Sequence[float | Sequence[float]]) -> bool:
    """Whether a box of four numbers ends before it begins, as one of a corner, a width and a height may."""
    flat = [v for v in box if isinstance(v, int | float)]
    return len(flat) == len(box) == 4 and (flat[2] < flat[0] or flat[3] < flat[1])


def polygons(boxes: Sequence[Sequence[float | Sequence[float]]]) -> tuple[tuple[Point, ...], ...] | None:
    """Boxes in pixels, [x1, y1, x2, y2] or corners [[x, y], ...] in any order, as polygons.

    None if there is no box, or one without area.
    """
    made = [convex(_corners(box)) for box in boxes]
    whole = tuple(polygon for polygon in made if polygon is not None)
    return whole if whole and len(whole) == len(made) else None


def _corners(box: Sequence[float | Sequence[float]]) -> list[list[float]]:
    flat = [v for v in box if isinstance(v, int | float)]
    if len(flat) == len(box) == 4:
        x1, y1, x2, y2 = flat
        return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    if len(flat) == len(box):  # x, y, x, y, ...
        return [list(pair) for pair in zip(flat[::2], flat[1::2], strict=False)]
    return [list(point) for point in box if not isinstance(point, int | float)]


def _regions(example: Example) -> Regions:
    assert example.regions is not None, f"{example.id} has no true boxes"
    return example.regions
