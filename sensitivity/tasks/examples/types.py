"""Example, Task and Gallery: what a model is asked, and how its answers are scored."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SPLITS: tuple[str, ...] = ("evaluation", "calibration")


SHORT = "\nAnswer the question using a single word or phrase."  # appended to a question, as in LLaVA-1.5 and GeoChat


class ImageSource(Protocol):
    """An image that is read only when it is needed: a Path, or a cell of a saved data set."""

    def read_bytes(self) -> bytes: ...

    def resolve(self) -> Hashable:
        """A value that is equal for equal images."""


@dataclass(frozen=True, eq=False, slots=True)  # slots: there may be hundreds of thousands (reports/memory.md)
class Example:
    """One image, one prompt, and the right answers; examples of one cluster share an image.

    The likelihood of the first answer is measured. `regions` are the true boxes if the answer should be boxes. `more`
    are further images, which follow the first one, and `turns` are earlier prompts of a conversation, with the answers
    that were given to them. Where images stand among the texts of the prompt, `pieces` are its texts in order, with
    None for each image.
    """

    id: str
    cluster: str
    kind: str
    image: NDArray[np.uint8] | ImageSource
    prompt: str
    answers: tuple[str, ...]
    regions: Regions | None = None
    more: tuple[NDArray[np.uint8] | ImageSource, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    pieces: tuple[str | None, ...] = ()

    @property
    def images(self) -> tuple[NDArray[np.uint8] | ImageSource, ...]:
        """All images in the order in which the model sees them."""
        return (self.image, *self.more)


Metric = Callable[[Sequence[str], Sequence[Example]], float]


@dataclass(frozen=True)
class Gallery:
    """A retrieval task: images and captions find each other among `pool` images instead of answering a prompt.

    The `top` most similar pairs are compared again by a model that reads an image and a text together; 0 for none.
    """

    pool: int
    top: int


@dataclass(frozen=True, eq=False)
class Task:
    """Examples and the rule that scores an answer.

    `exact` says that an answer scores only if it equals a right one, apart from case and white space. Generation then
    stops as soon as an answer begins like none of them.

    `search` are settings of generate() beside greedy search, such as a number of beams; no shortcut is taken then.

    `readable` says whether an answer holds what the score reads, such as a box; one that does not is malformed.

    `metrics` are further figures of all answers together. Those in `slow` start a program of their own and are not
    computed for every plan. `notes` say which examples were left out.
    """

    name: str
    examples: tuple[Example, ...]
    score: Callable[[str, Example], float]
    exact: bool = False
    max_new_tokens: int = 32
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gallery: Gallery | None = None
    slow: tuple[str, ...] = ()
    readable: Callable[[str], bool] = lambda answer: True
    search: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with any id, prompt, answer, box or image."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.id, example.kind, example.prompt, example.answers)).encode())
            if example.regions:
                digest.update(repr(example.regions).encode())
            if example.turns:
                digest.update(repr(example.turns).encode())
            if example.pieces:
                digest.update(repr(example.pieces).encode())
            for image in example.images:
                pixels = np.ascontiguousarray(image).tobytes() if isinstance(image, np.ndarray) else image.read_bytes()
                digest.update(pixels)
        return digest.hexdigest()[:16]

    @cached_property
    def chance(self) -> float:
        """The score of a model that sees nothing: it always gives the most common right answer of each kind."""
        if self.gallery:
            return 1 / min(self.gallery.pool, len({example.cluster for example in self.examples}))
        commonest: dict[str, str] = {}
        for kind in {example.kind for example in self.examples}:
            answers = Counter(example.answers[0] for example in self.examples if example.kind == kind)
            commonest[kind] = answers.most_common(1)[0][0]
        return float(np.mean([self.score(commonest[example.kind], example) for example in self.examples]))

    def measure(self, answers: Sequence[str]) -> dict[str, float]:
        """The further metrics, from one answer per example in the order of the examples."""
        if len(answers) != len(self.examples):
            raise ValueError(f"{len(answers)} answers for {len(self.examples)} examples")
        return {name: float(metric(answers, self.examples)) for name, metric in self.metrics.items()}

    def quick(self, rows: Mapping[str, Sequence[object]]) -> dict[str, float]:
        """The further metrics that are not slow, from the rows of a trial: in any order, of any number of examples."""
        named = zip(rows["task"], rows["example"], rows["answer"], strict=True)
        answer_of = {example: str(answer) for name, example, answer in named if name == self.name}
        examples = [example for example in self.examples if example.id in answer_of]
        answers = [answer_of[example.id] for example in examples]
        names = [name for name in self.metrics if examples and name not in self.slow]
        values = {name: float(self.metrics[name](answers, examples)) for name in names}
        # a metric is NaN while a kind of question has no answer yet
        return {name: value for name, value in values.items() if math.isfinite(value)}


def exact(answer: str, example: Example) -> float:
    """1 if the answer equals a right one, apart from case and white space."""
    given = " ".join(answer.lower().split())
    return float(any(given == " ".join(right.lower().split()) for right in example.answers))


def mean_of(score: Callable[[str, Example], float]) -> Metric:
    """The metric of all answers that is the mean of a score per example."""
    return lambda answers, examples: float(np.mean([score(a, e) for a, e in zip(answers, examples, strict=True)]))


Box = tuple[float, float, float, float, float]


Point = tuple[float, float]


@dataclass(frozen=True)
class Regions:
    """The true boxes of an image as convex polygons in pixels, and the image's size."""

    width: int
    height: int
    polygons: tuple[tuple[Point, ...], ...]
