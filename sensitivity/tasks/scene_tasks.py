"""The tasks of the embedded models: questions, captions, backgrounds and boxes in scenes of handwritten digits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sensitivity.tasks import scenes
from sensitivity.tasks.examples.types import Example, Task, exact
from sensitivity.tasks.scoring.boxes import oriented_iou, parse

THRESHOLD = 0.5  # of the oriented intersection over union, above which a box counts as found


def vqa(split: str, n: int, seed: int) -> Task:
    """Position, colour, digit of a colour, existence and count: one question of each kind per scene."""
    return Task("vqa", _examples(split, n, seed, scenes.VQA_KINDS), exact, exact=True, max_new_tokens=8)


def caption(split: str, n: int, seed: int) -> Task:
    return Task("caption", _examples(split, n, seed, ["caption"]), exact, exact=True, max_new_tokens=48)


def scene(split: str, n: int, seed: int) -> Task:
    return Task("scene", _examples(split, n, seed, ["scene"]), exact, exact=True, max_new_tokens=4)


def ground(split: str, n: int, seed: int) -> Task:
    """Boxes: right where the oriented intersection over union with the true one is at least one half."""
    return Task("ground", _examples(split, n, seed, ["ground"]), found, max_new_tokens=16)


def found(answer: str, example: Example) -> float:
    given, right = parse(answer), parse(example.answers[0])
    return float(len(given) == 1 and oriented_iou(given[0], right[0]) >= THRESHOLD)


def _examples(split: str, n: int, seed: int, kinds: Sequence[str]) -> tuple[Example, ...]:
    """One question of each kind per scene, drawn with the seed, until there are n."""
    found: list[Example] = []
    for index in range(math.ceil(n / len(kinds))):
        one = scenes.scene(split, seed, index)
        asked = scenes.questions(one, seed)
        for kind in kinds:
            choice = [question for question in asked if question.kind == kind]
            drawn = choice[int(np.random.default_rng([seed, index, scenes.KINDS.index(kind)]).integers(len(choice)))]
            found.append(Example(f"{one.id}-{kind}", one.id, kind, one.image, drawn.prompt, (drawn.answer,)))
    return tuple(found[:n])
