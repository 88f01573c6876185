"""Boxes: which tokens of an answer write each number of a box, and how far a plan moves that number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sensitivity.models.vlm import VLM
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.scoring.boxes import parse

NUMBERS = ("left", "top", "right", "bottom", "angle")  # of a box, in the order in which it is written
_NUMBER = re.compile(r"-?\d+")


def writes_boxes(tasks: Sequence[Task]) -> bool:
    """Whether the right answer to every example is one box."""
    return all(
        bool(example.answers) and len(parse(example.answers[0])) == 1 for task in tasks for example in task.examples
    )


def tokens_of(vlm: VLM, number: int, targets: Tensor) -> Tensor:
    """1 for each token of right answers (rows x positions) that writes at least a part of this number, otherwise 0."""
    found = torch.zeros(targets.shape)
    for row, tokens in enumerate(targets.tolist()):
        # where each token begins and ends in the text: some tokens write several characters, some a part of one
        ends = [len(vlm.processor.tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))]
        spans = [match.span() for match in _NUMBER.finditer(vlm.processor.tokenizer.decode(tokens))]
        low, high = spans[number]
        for i, end in enumerate(ends):
            found[row, i] = float((ends[i - 1] if i else 0) < high and end > low)
    return found


def mean_shifts(before: Mapping[Any, str], after: Mapping[Any, str]) -> dict[str, float]:
    """How far each number of a box is from before: the mean over examples whose answers are one box both times."""
    pairs = [(parse(before[name]), parse(after[name])) for name in before if name in after]
    both = [(one[0], other[0]) for one, other in pairs if len(one) == len(other) == 1]
    return {
        name: sum(abs(other[i] - one[i]) for one, other in both) / len(both) for i, name in enumerate(NUMBERS) if both
    }
