"""Draws calibration images from a file whose lines name no split; all copies of an image stay together."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from sensitivity.spec.errors import UserError
from sensitivity.tasks.datasets.source import CALIBRATION_ONE_IN

MIN_IMAGES = 5  # with fewer images, none is kept for calibration, since one would be too large a share


def choose_calibration_images(folder: Path, groups: Iterable[Sequence[str]]) -> frozenset[str]:
    """The names of a tenth of the images, but at least one; none if there are fewer than MIN_IMAGES.

    `groups` are the images of each line. All images of a line stay together, as do lines that share an image.

    Images are drawn by a hash of their names, not by the task's seed: a plan is verified on examples of another seed,
    which must not contain an image that it was calibrated on.
    """
    groups = list(groups)
    image_of = _joined(_images(folder, sorted({name for group in groups for name in group})), groups)
    drawn = a_tenth(image_of.values())
    return frozenset(name for name, image in image_of.items() if image in drawn)


def a_tenth(images: Iterable[str]) -> frozenset[str]:
    """A tenth of the images, but at least one; none if there are fewer than MIN_IMAGES. Their names alone decide."""
    ordered = sorted(set(images), key=lambda name: hashlib.sha256(name.encode()).digest())
    return frozenset(ordered[: max(1, round(len(ordered) / CALIBRATION_ONE_IN))] if len(ordered) >= MIN_IMAGES else ())


def too_few(where: Path) -> UserError:
    """The error for data of too few images, if some must be kept for calibration."""
    return UserError(
        f"{where} asks about fewer than {MIN_IMAGES} images, too few to keep one for calibration; add questions about "
        "others, or name other data with --calibration"
    )


def kept(split: str, held_out: int, images: int) -> str:
    """A note that says what was drawn for calibration."""
    verb = "are" if split == "calibration" else "leave out"
    return f"{split} examples {verb} {held_out} of {images} images, which are kept for calibration"


def _joined(image_of: dict[str, str], groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Each name with one image that stands for all images that lines connect with it, directly or through others."""
    parent = {image: image for image in image_of.values()}

    def root(image: str) -> str:
        while parent[image] != image:
            parent[image] = image = parent[parent[image]]  # path halving
        return image

    for group in groups:
        for name in group[1:]:
            one, other = sorted((root(image_of[group[0]]), root(image_of[name])))
            parent[other] = one
    return {name: root(image) for name, image in image_of.items()}


def _images(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Each name with the first name of the same image: by another path, through a link, or in a copy of the file."""
    files = {name: os.path.realpath(folder / name) for name in names}
    sizes = {file: _size(file) for file in files.values()}
    of_size = Counter(sizes.values())
    first: dict[object, str] = {}
    first_name = {}
    for name, file in files.items():
        size = sizes[file]
        # only files of equal size can be copies, so few files are read
        same = _content_hash(file) if size is not None and of_size[size] > 1 else file
        first_name[name] = first.setdefault(same, name)
    return first_name


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size if os.path.isfile(file) else None
    except (OSError, ValueError):  # opening it later reports a missing image
        return None


def _content_hash(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:  # opening it later reports an unreadable image
        return file
