"""A data set that Hugging Face `datasets` saved, as lines whose images are read when they are needed."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import InvalidValue, content
from sensitivity.tasks.datasets import source
from sensitivity.tasks.own.calibration_images import a_tenth, kept, too_few

NEEDS = (
    "it takes a folder that datasets' save_to_disk wrote, with the columns image, prompt (or question) and answers (or "
    "answer; or boxes), and optionally id, image_id and kind"
)
PARTS = ("test", "validation", "val", "train")  # the first that exists is for evaluation; train is for calibration


class Rows(Protocol):
    """The part of a `datasets.Dataset` that is used here; the library has no type hints."""

    column_names: list[str]

    def __getitem__(self, number: int, /) -> source.Record: ...

    def __iter__(self) -> Iterator[source.Record]: ...

    def select_columns(self, names: list[str], /) -> Rows: ...

    def remove_columns(self, names: list[str], /) -> Rows: ...


@dataclass(frozen=True)
class Cell:
    """The image in one row of a data set on disk; it is read when it is needed."""

    rows: Rows
    number: int
    where: str
    image: str  # a name that is equal for equal images, also in a folder of another name

    def read_bytes(self) -> bytes:
        """The bytes of the image file, stored in the row or at a path that it names."""
        stored = self.rows[self.number]["image"]
        if not isinstance(stored, dict) or (stored["bytes"] is None and stored["path"] is None):
            raise FileNotFoundError("there is no image")
        return bytes(stored["bytes"]) if stored["bytes"] is not None else content(Path(stored["path"]))

    def resolve(self) -> str:
        """The image's name, which is equal for equal images."""
        return str(self)

    def __str__(self) -> str:
        return f"{self.where}/{self.image}"


def lines_of(folder: Path, split: str, boxes: bool) -> tuple[Iterator[source.Record], tuple[str, ...]]:
    """The rows of a split, as objects like the lines of a JSON Lines file, and notes on them.

    If the data set has no split for calibration, a tenth of the images is used for it.
    """
    part, rows = _rows(folder, split)
    prompt = _column(folder, rows, "prompt", "question")
    right = _column(folder, rows, *(("boxes",) if boxes else ("answers", "answer")))
    # without the image column, since iterating would read each row's image into memory
    texts, cells = rows.remove_columns(["image"]), _cells(folder, part, rows)
    names = {cell.image for cell in cells}
    held_out = a_tenth(names) if part.hashed else frozenset()
    if part.hashed and split == "calibration" and not held_out:
        raise too_few(folder)

    def lines() -> Iterator[source.Record]:
        for cell, row in zip(cells, texts, strict=True):
            if not part.hashed or (cell.image in held_out) == (split == "calibration"):
                line = {name: row[name] for name in ("id", "kind") if row.get(name) is not None}
                fields = {"image": cell, "prompt": row[prompt], "boxes" if boxes else "answers": row[right]}
                yield line | fields | {"number": cell.number + 1}

    note = f"no split for calibration here: {kept(split, len(held_out), len(names))}"
    return lines(), (note,) if held_out else ()


def _cells(folder: Path, part: source.Part, rows: Rows) -> list[Cell]:
    """The image of each row, by the image's id or, where it has none, by its content."""
    images, cells = rows.select_columns(["image"]), []
    for number, row in enumerate(rows.remove_columns(["image"])):
        cell = Cell(images, number, f"{folder.name}/{part.name}", str(row.get("image_id") or ""))
        cells.append(cell if row.get("image_id") is not None else replace(cell, image=_content_hash(cell)))
    return cells


def _rows(folder: Path, split: str) -> tuple[source.Part, Rows]:
    """The part of a saved data set that holds a split, and its rows, whose images stay encoded."""
    if importlib.util.find_spec("datasets") is None:
        why = f"{folder} is a folder; to read it as a saved data set"
        raise UserError(f"{why}, type pip install 'vlm-sensitivity[tasks]'")
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets, Arrow and JSON raise many kinds on a damaged folder
        raise UserError(f"cannot read {folder} as a saved data set ({reason(error)}); {NEEDS}") from error
    part = source.Part("all", split, hashed=True)
    if isinstance(saved, datasets.DatasetDict):
        known = [name for name in PARTS if name in saved]
        if not known:
            raise UserError(f"{folder} has the splits {', '.join(saved)}; one of {', '.join(PARTS)} is needed")
        separate = known[0] != "train" and "train" in known
        part = source.Part("train" if separate and split == "calibration" else known[0], split, hashed=not separate)
        saved = saved[part.name]
    _column(folder, saved, "image")
    try:
        return part, saved.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        why = f"the column image of {folder} holds no images ({reason(error)}); {NEEDS}"
        raise UserError(why) from error


def _content_hash(cell: Cell) -> str:
    """A name for an image without an id: the hash of its content.

    An unreadable image is left out later; until then its row number is its name.
    """
    try:
        return hashlib.sha256(cell.read_bytes()).hexdigest()[:16]
    except (InvalidValue, OSError):
        return f"row-{cell.number}"


def _column(folder: Path, rows: Rows, *names: str) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise UserError(f"{folder} has no column {' or '.join(names)}; {NEEDS}")
