"""Ctrl-C and SIGTERM end a verb alike; they come again where a library swallowed them, as finalizers do."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sensitivity.cli.processes.workers import is_child

AGAIN, AFTER_IMPORT = 0.1, 1.0  # seconds until a signal comes again that a finalizer or an import swallowed
IMPORTING = "<frozen importlib._bootstrap>"  # the file of frames that import a module


class Interrupts:
    """The signal that stops the verb, and what becomes of it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first that came
        self.again = False
        self.unraisable = sys.unraisablehook

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, and once more where an import swallows it."""
        self.signal, again, self.again = self.signal or signal.Signals(number), self.again, False
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
            number = self.signal or signal.SIGINT
            if signal.getsignal(number) == self.handle:  # else the verb has ended
                self.again = True
                signal.pthread_kill(threading.main_thread().ident or 0, number)

        timer = threading.Timer(seconds, send)
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def heard() -> Iterator[Interrupts]:
    """Until the block ends, both signals are raised until nothing swallows them; a process that ignores one goes on to.

    SIGTERM ends a worker at once: it is how the launcher stops it, which then gives its plan back.
    """
    interrupts = Interrupts()
    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    if not is_child():
        usual[signal.SIGTERM] = signal.SIG_DFL
    usual = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    if threading.current_thread() is not threading.main_thread() or not usual:
        yield interrupts
        return
    for number in usual:
        signal.signal(number, interrupts.handle)
    sys.unraisablehook = interrupts.swallowed
    try:
        yield interrupts
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        sys.unraisablehook = interrupts.unraisable


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
