"""Zero-shot scene classification: AID and UCMerced, with one folder of images per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.errors import UserError
from sensitivity.spec.fields import TEXT
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.scoring.answer_text import equals_squeezed

GET_AID = "download AID.zip (captain-whu.github.io/AID) and unpack it, to have Airport/airport_1.jpg and its like there"
GET_UCMERCED = (
    "download UCMerced_LandUse.zip (weegee.vision.ucmerced.edu/datasets/landuse.html), and unpack it, to have "
    "Images/agricultural/agricultural00.tif and its like there"
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


def aid(folder: Path, split: str, n: int, seed: int) -> Task:
    """The classes of AID's scenes."""
    return _task(DatasetFolder("aid", folder, GET_AID), split, n, seed)


def ucmerced(folder: Path, split: str, n: int, seed: int) -> Task:
    """The classes of UCMerced's scenes."""
    return _task(DatasetFolder("ucmerced", folder / "Images", GET_UCMERCED), split, n, seed)


def _task(source: DatasetFolder, split: str, n: int, seed: int) -> Task:
    """The task of a data set without official splits, of which a tenth of the images is for calibration."""
    classes = {name: files for name, files in _classes(source).items() if files}
    if len(classes) < 2:
        raise UserError(f"{source.name} needs a folder of images for each class in {source.folder}; {source.get}")
    listed = ", ".join(classes)
    prompt = f"Classify the image from the following classes: {listed}. Answer in one word or a short phrase."
    rows: Iterator[Example | Flaw] = (
        Example(f"{name}/{file.name}", f"{name}/{file.name}", "scene", file, prompt, (name,))
        if TEXT.fits(f"{name}/{file.name}")
        else Flaw(ascii(f"{name}/{file.name}"), "a file whose name is not UTF-8")
        for name, files in classes.items()
        for file in files
    )
    examples, notes = source.drawn_examples(rows, source.part(split), n, seed)
    return Task(source.name, examples, equals_squeezed, max_new_tokens=16, notes=notes)


def _classes(source: DatasetFolder) -> dict[str, list[Path]]:
    if not source.folder.is_dir():
        raise UserError(f"{source.name}: no folder {source.folder}; {source.get}")
    return {
        folder.name: sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        for folder in sorted(source.folder.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and TEXT.fits(folder.name)
    }
