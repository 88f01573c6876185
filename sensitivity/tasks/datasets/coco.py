"""COCO captions: images of val2017, scored against the five captions that people wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.fields import ANY_TEXT, FILE_INSIDE, WHOLE
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, checked_records
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.scoring import captions as caption_scores

GET = (
    "download annotations_trainval2017.zip and val2017.zip from cocodataset.org and unpack both there, to have "
    "annotations/captions_val2017.json and val2017/ (train2017 too, to calibrate on training images)"
)
PROMPT = "Provide a one-sentence caption for the provided image."
IMAGE = {"id": WHOLE, "file_name": FILE_INSIDE}
CAPTION = {"id": WHOLE, "image_id": WHOLE, "caption": ANY_TEXT}
FILE = "annotations/captions_{}.json"


def coco_captions(folder: Path, split: str, n: int, seed: int) -> Task:
    """The captions of COCO, scored by CIDEr."""
    source = DatasetFolder("coco-captions", folder, GET)
    part = source.part(split, ("val2017", "train2017"), (FILE, "{}"))
    source.file(part.name)
    examples, notes = source.drawn_examples(_rows(source, part.name), part, n, seed)
    return caption_scores.task(source.name, examples, notes)


def _rows(source: DatasetFolder, part: str) -> Iterator[Example | Flaw]:
    """One example per image, with all its captions as right answers."""
    data = source.json(FILE.format(part), "images", "annotations")
    images = list(checked_records(data["images"], "an image", IMAGE))
    written: dict[int, list[str]] = {image["id"]: [] for image in images}
    for annotation in checked_records(data["annotations"], "a caption", CAPTION):
        if annotation["image_id"] not in written:
            yield Flaw(str(annotation["id"]), "a caption of an image that is not in the list")
        elif annotation["caption"].strip():
            written[annotation["image_id"]].append(annotation["caption"].strip())
    for image in images:
        name = str(image["id"])
        if right := tuple(written[image["id"]]):
            yield Example(name, name, "caption", source.folder / part / image["file_name"], PROMPT, right)
        else:
            yield Flaw(name, "no caption")
