"""The process that runs a trial: how it is named in the queue, and whether it has died."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TypedDict


class Owner(TypedDict):
    """A process; the time of its start (`since`) tells it from a later process with the same pid."""

    host: str
    pid: int
    since: str | None


def this_process() -> Owner:
    """This process as the owner of a trial."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks: a new process may get the pid of a dead one."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def is_dead(owner: Owner | None) -> bool:
    """Whether the owner of a trial is known to have ended; a process on another machine counts as alive."""
    if owner is None:
        return True
    if owner["host"] != socket.gethostname() or sys.platform == "win32":  # on Windows, signal 0 sends Ctrl-C
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process has this pid; its start tells whether it is the owner
        pass
    return bool(_started(owner["pid"]) != owner["since"])
