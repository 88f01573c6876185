"""Where a plan's damage enters: the patches of an image and the tokens of a question, as `explain` stored them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.counting import count
from sensitivity.study.storage import paths
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task as find_task


@dataclass(frozen=True)
class DamagePlaces:
    """Where the damage enters one example: what makes the right answer less likely, as a share of the worst place."""

    places: tuple[tuple[float, ...], ...]  # rows of an image's patches, 0 to 1; empty where they are not known
    question: tuple[tuple[str, float], ...]  # pieces of the question, with a share from 0 to 1
    damage: float  # the sum over all places and pieces
    square: tuple[str, float] | None  # the square of the image that the places cover (models.processors.square_seen)

    def frame(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, width and height of what the model sees of an image, in the image's pixels."""
        if self.square is None:
            return 0.0, 0.0, float(width), float(height)
        of, share = self.square
        side = share * (min if of == "short" else max)(width, height)
        return (width - side) / 2, (height - side) / 2, side, side

    @property
    def words(self) -> str:
        """The text alternative: the worst places and pieces."""
        cells = sorted(
            ((value, row, column) for row, values in enumerate(self.places) for column, value in enumerate(values)),
            reverse=True,
        )
        where = [f"row {row + 1}, column {column + 1}" for value, row, column in cells[:3] if value > 0]
        size = f"{len(self.places)} x {len(self.places[0])} patches" if self.places else ""
        what = sorted(((value, piece.strip()) for piece, value in self.question if piece.strip()), reverse=True)
        said = [f"“{piece}”" for value, piece in what[:3] if value > 0]
        image = f"of {size} most at {'; '.join(where)}" if where else ""
        words = f"of the question most at {', '.join(said)}" if said else ""
        return "Where the damage enters: " + ("; ".join(filter(None, (image, words))) or "nowhere known")


@dataclass(frozen=True)
class Explained:
    """What `explain` found of a plan: shares of the damage, and where it enters each example."""

    components: Mapping[str, float]
    modalities: Mapping[str, float]
    change: float
    count: int  # of examples
    of_failures: bool
    # by the example's id, or by `id_in_task` where two tasks have the same ids
    examples: Mapping[str, DamagePlaces]
    # by which the examples are found again: task, split, n and seed; and the name of the task in the study, which an
    # earlier version did not store
    sources: Sequence[Mapping[str, Any]]

    def places_in(self, task: str, example: str) -> DamagePlaces | None:
        """Where the damage enters an example of a task."""
        if not any(source.get("name", task) == task for source in self.sources):
            return None
        return self.examples.get(id_in_task(example, task)) or self.examples.get(example)

    @property
    def words(self) -> str:
        """Where the damage comes from, as a sentence."""
        which = count(self.count, "answer") if self.of_failures else count(self.count, "calibration example")
        if names := [source["name"] for source in self.sources if "name" in source]:
            which += f" of {' and '.join(names)}"
        which += " that got worse" if self.of_failures else ""
        shares = (
            ", ".join(f"{name} {100 * value / self.change:.0f} %" for name, value in table.items() if value)
            for table in (self.components, self.modalities)
        )
        parts, modalities = shares
        return f"Of the damage on {which}, by part: {parts}. It enters at tokens of: {modalities}."


def explanations_of(study: Path, plan: Plan) -> list[Explained]:
    """What `explain` found of a plan: on answers that got worse, and on calibration examples, as far as it was run."""
    explanations = []
    for file in paths.explanation_files(study, plan.key):
        # not explained: a file that is missing (OSError), that is no JSON (ValueError), or of an earlier version, which
        # lacks a field (KeyError) or has one of another type (TypeError); `explain` writes it anew
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            explanations.append(_read(json.loads(file.read_text(encoding="utf-8"))))
    return sorted(explanations, key=lambda one: not one.of_failures)


def examples_of(found: Explained) -> Iterator[tuple[Example, DamagePlaces]]:
    """The examples that were explained, drawn again, and where damage enters; none of a task whose data are gone."""
    for source in found.sources:
        with contextlib.suppress(UserError, OSError):
            drawn = find_task(source["task"], source["split"], source["n"], source["seed"])
            for example in drawn.examples:
                if places := found.places_in(source.get("name", drawn.name), example.id):
                    yield example, places


def id_in_task(example: str, task: str) -> str:
    """The name of an example whose id another task has, too."""
    return f"{example} of {task}"


def _read(data: Mapping[str, Any]) -> Explained:
    """What `explain` found, from its JSON."""
    regions, questions = data["regions"], data["questions"]
    square = data["square_seen"]
    examples = {}
    for name in dict.fromkeys((*questions, *regions)):
        places, question = regions.get(name, []), questions.get(name, [])
        patches = [float(value) for row in places for value in row]
        tokens = [float(value) for _, value in question]
        # an image has hundreds of places and a question few tokens: on a common scale, the image would seem undamaged
        examples[name] = DamagePlaces(
            tuple(tuple(_share(value, patches) for value in row) for row in places),
            tuple((str(piece), _share(value, tokens)) for piece, value in question),
            sum(patches) + sum(tokens),
            None if square is None else (str(square[0]), float(square[1])),
        )
    change, count, sources = float(data["change"]), int(data["examples"]), data["data"]
    failures = any(source["split"] == "evaluation" for source in sources)
    return Explained(data["components"], data["modalities"], change, count, failures, examples, sources)


def _share(value: float, every: Sequence[float]) -> float:
    """A value as a share of the largest; one that makes the right answer likelier counts as 0."""
    return max(float(value), 0.0) / max([*every, 1e-300])
