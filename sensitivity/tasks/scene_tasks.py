"""The tasks of the embedded models: questions, captions, backgrounds and boxes in scenes of digits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sensitivity.tasks import scenes
from sensitivity.tasks.examples.types import Example, Task, exact
from sensitivity.tasks.scoring.boxes import oriented_iou, parse

THRESHOLD = 0.5  # the smallest oriented intersection over union at which a box counts as found


def vqa(split: str, n: int, seed: int) -> Task:
    """One question of each kind per scene: position, color, digit of a color, existence and count."""
    return Task("vqa", _examples(split, n, seed, scenes.VQA_KINDS), exact, exact=True, max_new_tokens=8)


def caption(split: str, n: int, seed: int) -> Task:
    """The caption of each scene, word for word."""
    return Task("caption", _examples(split, n, seed, ["caption"]), exact, exact=True, max_new_tokens=48)


def scene(split: str, n: int, seed: int) -> Task:
    """The background of each scene."""
    return Task("scene", _examples(split, n, seed, ["scene"]), exact, exact=True, max_new_tokens=4)


def ground(split: str, n: int, seed: int) -> Task:
    """A box for a digit: right if its oriented intersection over union with the true box is at least 0.5."""
    examples = _examples(split, n, seed, ["ground"])
    return Task("ground", examples, found, max_new_tokens=16, readable=lambda answer: bool(parse(answer)))


def found(answer: str, example: Example) -> float:
    """1 if the answer is a single box that overlaps the true one enough."""
    given, right = parse(answer), parse(example.answers[0])
    return float(len(given) == 1 and oriented_iou(given[0], right[0]) >= THRESHOLD)


def _examples(split: str, n: int, seed: int, kinds: Sequence[str]) -> tuple[Example, ...]:
    """One question of each kind per scene, drawn with the seed, until there are n."""
    examples: list[Example] = []
    for index in range(math.ceil(n / len(kinds))):
        one = scenes.scene(split, seed, index)
        questions = scenes.questions_about(one, seed)
        for kind in kinds:
            choice = [question for question in questions if question.kind == kind]
            # the draw depends on the kind, not on its place in `kinds`: a task of one kind asks the same questions as
            # a task of all kinds
            drawn = choice[int(np.random.default_rng([seed, index, scenes.KINDS.index(kind)]).integers(len(choice)))]
            examples.append(Example(f"{one.id}-{kind}", one.id, kind, one.image, drawn.prompt, (drawn.answer,)))
    return tuple(examples[:n])
