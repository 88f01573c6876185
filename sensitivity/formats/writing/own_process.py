"""Calls a function in a process of its own: a crash there does no harm here, and it ends when this process does."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

PROGRAM = "from sensitivity.formats.writing.own_process import serve; serve()"
FAILED = 1  # the exit status of a process whose function raised an error
OF_OURS = re.compile(r"^sensitivity\.spec\.errors\.\w+: ")  # before the sentence, in the last line of a traceback


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int  # 0 or FAILED; anything else is a crash
    last_line: str  # of its standard error; where it raised an error of ours, the sentence

    @property
    def crashed(self) -> bool:
        """Whether it ended otherwise than by the end of its function or by an error."""
        return self.status not in (0, FAILED)


def call(function: Callable[..., None], **values: object) -> Ended:
    """Call a function of a module in a process of its own, with values that JSON holds; waits for its end."""
    asked = {"module": function.__module__, "function": function.__qualname__, "values": values}
    # standard error goes to a file: nobody reads it while the process runs, and a full pipe would block the process
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has crashed already
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                process.stdin.flush()
            process.wait()  # its standard input stays open till then: see `_end_with_caller`
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return Ended(process.returncode, OF_OURS.sub("", lines[-1]) if lines else "")


def serve() -> None:
    """Call the function that was asked for; this runs in the process of its own, and ends it.

    It ends at once: after some tracers, Python's usual end, which frees everything, crashes.
    """
    status = FAILED
    try:
        asked = json.loads(sys.stdin.readline())
        _end_with_caller()
        getattr(importlib.import_module(asked["module"]), asked["function"])(**asked["values"])
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _end_with_caller() -> None:
    """End this process when its caller ends, even by a kill: nobody would read what it makes."""

    def watch() -> None:
        # returns when the pipe closes, which the kernel does when the caller dies; not sys.stdin.read, whose lock a
        # thread would still hold when this process ends
        os.read(sys.stdin.fileno(), 1)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()
