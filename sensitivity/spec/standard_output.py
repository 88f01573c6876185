"""Keeps standard output for a command's result: what libraries print, in Python or C, is redirected."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Until the block ends, prints of this process go to standard error, including those of compiled code."""
    with contextlib.redirect_stdout(sys.stderr), _redirected_to(2):  # Python's prints, and those of C
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """The same, but what compiled code printed is written by Python when the block has ended, for lines of JSON."""
    with tempfile.TemporaryFile() as compiled:
        try:
            with contextlib.redirect_stdout(sys.stderr), _redirected_to(compiled.fileno()):
                yield
        finally:
            compiled.seek(0)
            sys.stderr.write(compiled.read().decode(errors="replace"))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Until the block ends, discard what compiled code prints, for libraries without a flag to silence them."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with _redirected_to(nowhere):
            yield
    finally:
        os.close(nowhere)


@contextlib.contextmanager
def _redirected_to(target: int) -> Iterator[None]:
    """Point file descriptor 1 at another one until the block ends.

    Python's and C's buffers are flushed on both sides: what they hold would otherwise go to the wrong place.
    """
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    _flush()
    try:
        os.dup2(target, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    # standard output may be closed, None, or a pipe that nobody reads; Windows has no CDLL(None)
    with contextlib.suppress(OSError, AttributeError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
