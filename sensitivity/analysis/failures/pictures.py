"""Small pictures of examples for a page, with the right boxes and both plans' boxes over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sensitivity.analysis.failures.changes import Change
from sensitivity.study.examples.questions import tasks_of
from sensitivity.tasks.examples.images import open_image, opened_image
from sensitivity.tasks.examples.types import Example, ImageSource, Point
from sensitivity.tasks.scoring.boxes import decoded
from sensitivity.tasks.scoring.grounding import ORIENTATION, SIDEWAYS

SIDE = 320  # pixels of a picture's long side
MAX_BYTES = 60_000  # of a picture: 60 of them and the rest of a report stay below 8 MB
QUALITIES = (80, 60, 40, 20)  # of JPEG, tried one after the other
TINY = 128  # pixels: pictures up to this side are stored without loss, and enlarged by the browser


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, the size of the original image, and boxes in pixels of the original."""

    uri: str
    width: int
    height: int
    boxes: tuple[tuple[str, str], ...] = ()  # whose boxes they are, and the corners of a polygon for SVG

    @property
    def tiny(self) -> bool:
        """Whether the picture must be enlarged to be seen."""
        return max(self.width, self.height) <= TINY


class Pictures:
    """The pictures of a study's examples, from image files, or else from the data that the study names."""

    def __init__(self, meta: Mapping[str, object]) -> None:
        self._meta = meta
        self._examples: dict[tuple[str, str], Example] | None = None
        self._made: dict[Hashable, Picture | None] = {}

    def of(self, change: Change) -> list[Picture]:
        """The pictures of an example, its boxes over the first one; fewer where images are not found."""
        files: tuple[Path | None, ...] = change.question.images if change.question else (None,)
        made = [self._picture(change, number, file) for number, file in enumerate(files)]
        pictures = [one for one in made if one is not None]
        if made and made[0] is not None:
            pictures[0] = _with_boxes(made[0], change)
        return pictures

    def _picture(self, change: Change, number: int, file: Path | None) -> Picture | None:
        name: Hashable = file or (change.task, change.example, number)
        if name not in self._made:
            source = file or self._from_data(change, number)
            self._made[name] = None if source is None else picture(source)
        return self._made[name]

    def _from_data(self, change: Change, number: int) -> NDArray[np.uint8] | ImageSource | None:
        """An image that is not a file: it was generated from a seed, or is a cell of a saved data set."""
        if self._examples is None:
            self._examples = {(task.name, one.id): one for task in tasks_of(self._meta) for one in task.examples}
        example = self._examples.get((change.task, change.example))
        return None if example is None or number >= len(example.images) else example.images[number]


def picture(source: NDArray[np.uint8] | ImageSource) -> Picture | None:
    """A small picture of an image; None where the image is missing or damaged."""
    try:
        size, image = _opened(source)
    except Exception:  # on a damaged file, each of Pillow's readers has errors of its own
        return None
    image.thumbnail((SIDE, SIDE))
    kind, content = "png", b""
    if max(size) <= TINY:
        content = _encoded(image, "PNG")
    for quality in QUALITIES if not content or len(content) > MAX_BYTES else ():
        kind, content = "jpeg", _encoded(image, "JPEG", quality)
        if len(content) <= MAX_BYTES:
            break
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *size)


def _opened(source: NDArray[np.uint8] | ImageSource) -> tuple[tuple[int, int], Image.Image]:
    """The size of the upright image, and the image; a large JPEG is decoded at a reduced size."""
    if isinstance(source, Path):
        with opened_image(source) as image:
            if image.format == "JPEG":
                sideways = image.getexif().get(ORIENTATION, 1) in SIDEWAYS
                size = (image.height, image.width) if sideways else image.size
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                return size, ImageOps.exif_transpose(image).convert("RGB")
    whole = open_image(source)
    return whole.size, whole.copy()


def _encoded(image: Image.Image, format: str, quality: int = 0) -> bytes:
    file = io.BytesIO()
    image.save(file, format, optimize=True, **({"quality": quality} if quality else {}))
    return file.getvalue()


def _with_boxes(one: Picture, change: Change) -> Picture:
    """The picture with the true boxes, and those that both answers hold."""
    asked = change.question
    right = () if asked is None else asked.regions.polygons if asked.regions else _boxes(asked.answers[:1], one)
    drawn = {"right": right, "before": _boxes((change.before.answer,), one)}
    drawn["after"] = _boxes((change.after.answer,), one)
    return Picture(
        one.uri, one.width, one.height, tuple((whose, _corners(box)) for whose, boxes in drawn.items() for box in boxes)
    )


def _boxes(texts: tuple[str, ...], one: Picture) -> tuple[tuple[Point, ...], ...]:
    """The boxes in some answers, in pixels of the original image."""
    return tuple(tuple(box) for text in texts for box in decoded(text, one.width, one.height))


def _corners(box: tuple[Point, ...]) -> str:
    """A box as the points of an SVG polygon."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in box)
