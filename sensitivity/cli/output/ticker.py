"""Progress where there is no terminal: a plain line at least every ten seconds, whatever is waited for."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import ClassVar

EVERY = 10.0  # seconds between two lines at most
FIRST = 3.0  # seconds before the first, where most work is over sooner

Line = Callable[[], str]


class Ticker:
    """Says what `line` gives every few seconds, from a thread of its own: no step need end for it.

    Of two, one inside the other, only the inner one speaks.
    """

    stack: ClassVar[list[Ticker]] = []

    def __init__(self, line: Line, first: float = 0.0, every: float = EVERY) -> None:
        self.line, self.first, self.every = line, first, every
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        pause = self.first
        while not self.over.wait(pause):
            if Ticker.stack[-1:] == [self]:
                with contextlib.suppress(ValueError, OSError):  # standard error is closed
                    print(self.line(), file=sys.stderr, flush=True)
            pause = self.every - 1  # a busy machine may wake it late

    def __enter__(self) -> Ticker:
        Ticker.stack.append(self)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        Ticker.stack.remove(self)


@contextlib.contextmanager
def working(title: str, quiet: bool = False) -> Iterator[None]:
    """Says that something goes on, and since when, where nobody knows how long it will take."""
    if quiet or sys.stderr.isatty():
        yield
        return
    began = time.monotonic()
    with Ticker(lambda: f"{title}: {clock(time.monotonic() - began)} so far", FIRST):
        yield


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
