"""Standard output belongs to what a command answers: what libraries print there, in Python or in C, goes elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Until the block ends, prints of this process go to standard error, also those of compiled code."""
    with contextlib.redirect_stdout(sys.stderr), _elsewhere(2):
        yield


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Until the block ends, what compiled code prints is lost; for a library that has no flag to keep it quiet."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with _elsewhere(nowhere):
            yield
    finally:
        os.close(nowhere)


@contextlib.contextmanager
def _elsewhere(target: int) -> Iterator[None]:
    """File descriptor 1 leads elsewhere; C's own buffer is emptied on both sides, as it knows nothing of that."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
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
    with contextlib.suppress(OSError, AttributeError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
