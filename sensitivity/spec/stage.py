"""Stages: what this process is doing now and how many items of it are done, as text for progress lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Stage:
    """Work on a known number of items: its name, the noun for an item, and how many items are done."""

    name: str
    noun: str  # plural, such as examples
    total: int
    done: int = 0
    at_most: bool = False  # whether it may end before all items are done
    began: float = field(default_factory=lambda: time.monotonic())

    def line(self) -> str:
        """A text such as `calibrating: 3 of 16 examples, 0:02:10 left`, without a time until the first item is done."""
        most = "at most " if self.at_most else ""
        line = f"{self.name}: {self.done} of {most}{self.total} {self.noun}"
        if not self.done:
            return line
        seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"{line}, {most}{clock(seconds)} left"


# the stages that run now; one that began inside another comes after it
_running: list[Stage] = []


def each(
    items: Iterable[T],
    name: str,
    noun: str,
    total: int,
    size: Callable[[T], int] = lambda _: 1,
    at_most: bool = False,
) -> Generator[T, None, None]:
    """Yield the items and count those that are done, for `now` to show; an item counts as `size(item)`."""
    stage = Stage(name, noun, total, at_most=at_most)
    _running.append(stage)
    try:
        for item in items:
            yield item
            stage.done += size(item)
    finally:
        _running.remove(stage)


def now() -> str:
    """The stages that run now as one text, the outer one first; an empty text if there is none."""
    return ", ".join(stage.line() for stage in tuple(_running))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
