"""Ctrl-C: comes again where a library swallowed it, as finalizers and imports do."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

AGAIN, AFTER_IMPORT = 0.1, 1.0  # seconds until a signal comes again that a finalizer or an import swallowed
IMPORTING = "<frozen importlib._bootstrap>"  # the file of frames that import a module


class Interrupts:
    """Whether Ctrl-C was pressed, and what becomes of it."""

    def __init__(self) -> None:
        self.pressed, self.again = False, False
        self.unraisable = sys.unraisablehook

    def handle(self, _: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, and once more where an import swallows it."""
        self.pressed, again, self.again = True, self.again, False
        if again and isinstance(sys.exception(), KeyboardInterrupt):
            return  # it was not swallowed: what was begun is put away
        if _is_importing(frame):
            self.repeat(AFTER_IMPORT)
        raise KeyboardInterrupt

    def swallowed(self, what: sys.UnraisableHookArgs) -> None:
        """Where nothing can be raised, as in a finalizer, Python would print the interrupt and go on."""
        if issubclass(what.exc_type, KeyboardInterrupt):
            self.repeat(AGAIN)
        else:
            self.unraisable(what)

    def repeat(self, seconds: float) -> None:
        """Send the signal again a little later, by a thread, to the main thread, whose waiting it ends."""

        def send() -> None:
            if signal.getsignal(signal.SIGINT) == self.handle:  # else the verb has ended
                self.again = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        timer = threading.Timer(seconds, send)
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def heard() -> Iterator[Interrupts]:
    """Until the block ends, Ctrl-C is raised until nothing swallows it; a process that ignores it goes on to."""
    interrupts = Interrupts()
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts.handle)
    sys.unraisablehook = interrupts.swallowed
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = interrupts.unraisable


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
