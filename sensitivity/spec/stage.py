"""What this process is doing now, and how far it has come: for the lines that show progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Stage:
    """Work of known length: its name, and how many of its items are done."""

    name: str
    items: str
    total: int
    done: int = 0
    began: float = field(default_factory=lambda: time.monotonic())

    def line(self) -> str:
        """Such as `calibrating: 3 of 16 examples, 0:02:10 left`; no time before the first item is done."""
        line = f"{self.name}: {self.done} of {self.total} {self.items}"
        if not self.done:
            return line
        seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"{line}, {clock(seconds)} left"


# stages that run now; one that was begun inside another comes after it
_running: list[Stage] = []


def each(items: Iterable[T], name: str, kind: str, total: int, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """The same items, while `now` tells how many of them are done; one item counts `size(item)`."""
    stage = Stage(name, kind, total)
    _running.append(stage)
    try:
        for item in items:
            yield item
            stage.done += size(item)
    finally:
        _running.remove(stage)


def now() -> str:
    """What runs now, from the outer stage to the inner one; nothing where no stage is known."""
    return ", ".join(stage.line() for stage in tuple(_running))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
