"""Shards: a task's images in portions of growing size, drawn in a fixed random order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sensitivity.tasks.examples.types import Example, Task

# images of the first shard, enough for an interval; a task of fewer than 80 begins with 5 % of its images
FIRST_SHARD = 4
MIN_IMAGES = 2  # in the first shard of any task: a score on fewer images has no interval
GROWTH = 4  # each shard ends at so many times the images of the one before
MAX_IMAGES = 512  # in one shard: this bounds the memory of a sweep, however large the task is


def shard_ends(tasks: Sequence[Task], growing: bool = True) -> list[int]:
    """Where the shards end, counted in images of the task that has the most.

    Growing shards give every plan a first score early and need few rounds. Otherwise every shard but the last has
    MAX_IMAGES.
    """
    total = max(len({example.cluster for example in task.examples}) for task in tasks)
    if any(task.gallery for task in tasks):
        return [total]  # a rank needs all images at once
    return shard_ends_of_total(total, growing)


def shard_ends_of_total(total: int, growing: bool = True) -> list[int]:
    """Where the shards of `total` images end."""
    ends: list[int] = []
    done, size = 0, min(max(total // 20, MIN_IMAGES), FIRST_SHARD) if growing else MAX_IMAGES
    while done < total:
        size = min(size, MAX_IMAGES)
        left = total - done - size
        if left <= size and size + left <= MAX_IMAGES:  # a small rest joins the last shard
            size += left
        done = min(total, done + size)
        ends.append(done)
        size = done * (GROWTH - 1)
    return ends


def shard(task: Task, begin: int, end: int, total: int) -> list[Example]:
    """A task's examples in the shard from image `begin` to `end` of `total`, the same in every process."""
    clusters: dict[str, list[Example]] = {}
    for example in task.examples:
        clusters.setdefault(example.cluster, []).append(example)
    names = sorted(clusters)
    random.Random(0).shuffle(names)
    # every task has a score after the first shard, even beside a task with a hundred times its images
    least = min(MIN_IMAGES, len(names))
    first, last = (max(round(position * len(names) / total), least) if position else 0 for position in (begin, end))
    return [example for name in names[first:last] for example in clusters[name]]
