"""Shards: a task's examples in ever larger portions, drawn without regard to their order, whole images at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sensitivity.tasks import Example, Task

FIRST = 4  # images: enough for an interval, and a few per cent of a usual sweep
GROWTH = 4
MOST = 512  # images: bounds what a sweep holds in memory, however large the task is


def cuts(tasks: Sequence[Task], growing: bool = True) -> list[int]:
    """Where the shards end, counted in images of the task that has the most.

    Growing shards give every plan a first score soon, and need few rounds; without, each is as large as memory likes.
    """
    total = max(len({example.cluster for example in task.examples}) for task in tasks)
    if any(task.gallery for task in tasks):
        return [total]  # an image is looked for among all
    return ends_of(total, growing)


def ends_of(total: int, growing: bool = True) -> list[int]:
    ends: list[int] = []
    size = FIRST if growing else MOST
    while (ends[-1] if ends else 0) < total:
        ends.append(min(total, (ends[-1] if ends else 0) + min(size, MOST)))
        size = ends[-1] * (GROWTH - 1)
    return ends


def shard(task: Task, begin: int, end: int, total: int) -> list[Example]:
    """A task's share of the images from `begin` to `end` of `total`: the same ones whoever asks, in one fixed order."""
    clusters: dict[str, list[Example]] = {}
    for example in task.examples:
        clusters.setdefault(example.cluster, []).append(example)
    names = sorted(clusters)
    random.Random(0).shuffle(names)
    first, last = (round(place * len(names) / total) for place in (begin, end))
    return [example for name in names[first:last] for example in clusters[name]]
