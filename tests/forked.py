"""Runs code in a copy of this process that has forgotten our modules: what is imported first, sooner than anew."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence


def forked(code: str, argv: Sequence[str] = ()) -> str:
    """What the code prints; an AssertionError with its last words where it fails."""
    with tempfile.TemporaryFile() as said:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which only wait in a process of pytest
            child = os.fork()
        if child == 0:
            _run(code, argv, said.fileno())
        _, status = os.waitpid(child, 0)
        said.seek(0)
        words = said.read().decode()
    assert status == 0, words
    return words


def _run(code: str, argv: Sequence[str], said: int) -> None:
    """The child, which ends here whatever happens: nothing of pytest may run a second time."""
    status = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        warnings.simplefilter("ignore")
        sys.argv = ["-c", *argv]
        for name in [name for name in sys.modules if name.split(".")[0] == "sensitivity"]:
            del sys.modules[name]
        exec(compile(code, "forked", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
