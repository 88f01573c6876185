"""Progress without a terminal: a plain line at least every ten seconds, whatever the program waits for."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

from sensitivity.spec import stage

EVERY = 10.0  # seconds between two lines at most
FIRST = 3.0  # seconds before the first line of `working`, so that short work prints none

Line = Callable[[], str]


class Ticker:
    """Prints what `line` returns every few seconds, from its own thread, so that even a long step shows progress.

    Where tickers are nested, only the innermost one prints.
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
                with contextlib.suppress(ValueError, OSError):  # standard error may be closed
                    print(self.line(), file=sys.stderr, flush=True)
            pause = self.every - 1  # a second less, since a busy machine wakes the thread late

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
    """Without a terminal, print what runs now and for how long the verb has been running."""
    if quiet or sys.stderr.isatty():
        yield
        return
    began = time.monotonic()

    def line() -> str:
        doing = stage.now()
        return f"{title}: {doing}{'; ' * bool(doing)}{stage.clock(time.monotonic() - began)} so far"

    with Ticker(line, FIRST):
        yield
