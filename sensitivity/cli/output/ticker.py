"""Progress without a terminal: a plain line at least every ten seconds, whatever the program waits for."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
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
        return f"{title}: {doing}{'; ' * bool(doing)}{clock(time.monotonic() - began)} so far"

    with Ticker(line, FIRST):
        yield


@contextlib.contextmanager
def counted(title: str, total: int, what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how much of a known amount of work is done: a bar on a terminal, elsewhere a line every few seconds.

    Yields a function, to be called with the amount that is done and the total.
    """
    done = 0

    def told(count: int, of: int) -> None:
        nonlocal done
        done = count

    if quiet:
        yield told
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), what, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            line = bar.add_task(title, total=total)
            yield lambda count, of: bar.update(line, completed=count, total=of)
    else:
        with Ticker(lambda: f"{title}: {done} of {total} {what}", FIRST):
            yield told


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
