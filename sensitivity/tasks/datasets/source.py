"""DatasetFolder: finds a published data set's files and split, draws examples, and reports flawed ones."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sensitivity.spec.errors import UserError
from sensitivity.spec.fields import InvalidValue, Kind, check, content, not_a_file, parsed, quoted, read, shortened
from sensitivity.tasks.examples import images
from sensitivity.tasks.examples.types import Example, Metric, Task
from sensitivity.tasks.examples.videos import Frame

MAX_FLAWED = 0.02  # the share of examples that may be left out, with a note; more are an error
_SEPARATORS = re.compile(r"[\s,]*")
Record = dict[str, Any]  # a JSON object; `checked_records` and `check` test the fields that are read
CALIBRATION_ONE_IN = 10  # one image in so many is for calibration if a data set has no other split for it


@dataclass(frozen=True)
class Flaw:
    """An example that cannot be used, and why."""

    id: str
    why: str


@dataclass(frozen=True)
class Part:
    """The part of a published data set that a split is read from, such as val2017.

    `hashed` says that both splits share the part, and that a hash of each image decides to which split it belongs.
    """

    name: str
    split: str
    hashed: bool

    def contains(self, image: str) -> bool:
        """Whether an image belongs to the split."""
        return not self.hashed or held_out(image) == (self.split == "calibration")

    @property
    def note(self) -> tuple[str, ...]:
        """A note for the user if the splits share one part."""
        if not self.hashed:
            return ()
        verb = "are" if self.split == "calibration" else "leave out"
        which = f"one image in {CALIBRATION_ONE_IN}, chosen by hash"
        return (f"no split for calibration here: {self.split} examples {verb} {which}",)


@dataclass(frozen=True)
class DatasetFolder:
    """A data set in a folder; `get` says what to download if something is missing."""

    name: str
    folder: Path
    get: str

    def file(self, name: str) -> Path:
        """The path of a file or folder, or an error that says what to download."""
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{self.name} needs {name} in {self.folder}; {self.get}")
        return path

    def json(self, name: str, *keys: str) -> Any:
        """The content of a JSON file, which must have these keys."""
        path = self.file(name)
        try:
            content = read(path)
        except InvalidValue as error:
            raise UserError(f"cannot read {path} as JSON ({error}); {self.get}") from error
        if keys and not (isinstance(content, dict) and set(keys) <= set(content)):
            raise UserError(f"{path} is not of the {self.name} layout: it has no {' or '.join(keys)}; {self.get}")
        return content

    def records(self, name: str, key: str) -> Iterator[Record]:
        """The objects of the list `key` in a JSON file, parsed one at a time.

        All of VQAv2's annotations as Python objects would take gigabytes. The standard library's decoder can start
        anywhere in a text, so no other parser is needed.
        """
        path = self.file(name)
        try:
            text = content(path).decode("utf-8-sig")
        except (InvalidValue, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} as JSON ({error}); {self.get}") from error
        start = re.search(rf'"{key}"\s*:\s*\[', text)
        if start is None:
            raise UserError(f"{path} is not of the {self.name} layout: it has no {key}; {self.get}")
        read, at = json.JSONDecoder().raw_decode, _next_object(text, start.end())
        while text[at : at + 1] != "]":
            try:
                one, at = read(text, at)
            except (ValueError, RecursionError) as error:
                raise UserError(f"cannot read {path} as JSON ({error}); {self.get}") from error
            yield one
            at = _next_object(text, at)

    def lines(self, name: str) -> Iterator[Record]:
        """The objects of a JSON Lines file."""
        path = self.file(name)
        if trouble := not_a_file(path):
            raise UserError(f"cannot read {path}: {trouble}; {self.get}")
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield check(parsed(line), {})
                    except InvalidValue as error:
                        raise UserError(f"{path}, line {number} is not a JSON object ({error}); {self.get}") from error

    def part(self, split: str, names: Sequence[str] = ("",), files: Sequence[str] = ()) -> Part:
        """The part for a split: for evaluation the first of `names`, for calibration the next whose files all exist.

        `files` include the images: COCO's archive of annotations covers training images that may not be downloaded.
        Without a part for calibration, both splits share the first one, divided by a hash of the image.
        """
        evaluation, *others = names
        whole = next((n for n in others if all((self.folder / file.format(n)).exists() for file in files)), None)
        if whole is None:
            return Part(evaluation, split, hashed=True)
        return Part(evaluation if split == "evaluation" else whole, split, hashed=False)

    def questions(
        self,
        rows: Callable[[DatasetFolder, str], Iterable[Example | Flaw]],
        part: Part,
        n: int,
        seed: int,
        score: Callable[[str, Example], float],
        metrics: Mapping[str, Metric] = {},
    ) -> Task:
        """A task of short answers to n questions of a part."""
        examples, notes = self.drawn_examples(rows(self, part.name), part, n, seed)
        return Task(self.name, examples, score, max_new_tokens=10, metrics=metrics, notes=notes)

    def drawn_examples(
        self, rows: Iterable[Example | Flaw], part: Part, n: int, seed: int
    ) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """n of the part's examples, drawn with the seed and sorted by id, and notes on examples that were left out."""
        flaws: list[Flaw] = []
        usable: list[Example] = []
        try:
            for row in rows:
                if isinstance(row, Flaw):
                    flaws.append(row)
                elif part.contains(row.cluster):
                    usable.append(row)
        except InvalidValue as error:
            why = f"{self.name} in {self.folder} is not of the official layout: {error}; {self.get}"
            raise UserError(why) from error
        notes = [*part.note, *self.flaw_notes(flaws, len(flaws) + len(usable))]
        # sorted, so that the sample does not depend on the order of a file or folder
        usable.sort(key=lambda example: example.id)
        drawn = draw(usable, n, seed, f"{self.name} in {self.folder}", part.split)
        seen, more = self.with_usable_images(drawn)
        return seen, (*notes, *more)

    def with_usable_images(self, drawn: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """The examples whose images can be used, and notes on the others.

        Images are checked after drawing, since opening all images of a data set would take minutes.
        """
        known: dict[tuple[str, int], str | None] = {}

        def why(example: Example) -> str | None:
            for number, image in enumerate(example.images):
                # examples of one cluster share the first image, but may have different further ones
                key = (example.id if number else example.cluster), number
                if key not in known:
                    known[key] = images.why_unusable(image)
                if known[key]:
                    return known[key]
            return None

        unreadable = [Flaw(self._named(example), reason) for example in drawn if (reason := why(example))]
        return tuple(e for e in drawn if not why(e)), tuple(self.flaw_notes(unreadable, len(drawn)))

    def _named(self, example: Example) -> str:
        """An example's id, with the path of its image from the data's folder, or else the name of its file."""
        image = example.image
        if not isinstance(image, Path | Frame):
            return shortened(example.id)
        if isinstance(image, Path) and image.is_relative_to(self.folder):
            return f"{shortened(example.id)}: {shortened(str(image.relative_to(self.folder)))}"
        return f"{shortened(example.id)}: {shortened(image.name)}"

    def flaw_notes(self, flaws: Sequence[Flaw], total: int) -> list[str]:
        """One note per kind of flaw, or an error if there are too many flaws."""
        notes = []
        for why in dict.fromkeys(flaw.why for flaw in flaws):
            ids = [flaw.id for flaw in flaws if flaw.why == why]
            few = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
            notes.append(f"{len(ids)} of {total} examples left out: {why} ({few})")
        if len(flaws) > MAX_FLAWED * total:
            most = f"at most {100 * MAX_FLAWED:.0f} % may be left out"
            raise UserError(f"{self.name} in {self.folder}: {'; '.join(notes)}; {most}; {self.get}")
        return notes


def checked_records(
    entries: object, what: str, required: Mapping[str, Kind], optional: Mapping[str, Kind] = {}
) -> Iterator[Record]:
    """The objects of a list, checked to have fields of these kinds; `what` names one of them in an error."""
    if isinstance(entries, list | tuple | Iterator):
        for entry in entries:
            yield check(entry, required, optional, what)
    else:
        raise InvalidValue(f"{what} should be a list, not {quoted(entries)}")


def _next_object(text: str, at: int) -> int:
    """The position after white space and commas: of the next object, or of the list's end."""
    between = _SEPARATORS.match(text, at)
    return between.end() if between else at


def draw(examples: Iterable[Example], n: int, seed: int, where: str, split: str) -> list[Example]:
    """n examples drawn with the seed, in their given order.

    A sample with a larger n and the same seed includes a smaller one: both are prefixes of the same permutation.
    """
    known: dict[str, Example] = {}
    for example in examples:
        if example.id in known:
            raise UserError(f"{where} has the id '{example.id}' twice; every example needs its own")
        known[example.id] = example
    if not known:
        raise UserError(f"{where} has no {split} examples")
    order = np.random.default_rng(seed).permutation(len(known))[:n]
    every = list(known.values())
    return [every[i] for i in sorted(order.tolist())]


def held_out(image: str) -> bool:
    """Whether an image is one of those that are kept for calibration.

    It depends on the image's name alone, so that the splits stay apart for every n, seed and order.
    """
    return int(hashlib.sha256(image.encode()).hexdigest(), 16) % CALIBRATION_ONE_IN == 0
