"""Whose turn it is: which waiting plan of a study a process takes next, and which plans a dead process left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

DONE = "done"  # user attribute: how far into the examples a trial has come, in clusters


def choose(trials: Sequence[FrozenTrial], last: int | None, wanted: Container[str] | None = None) -> FrozenTrial | None:
    """The waiting plan to take after trial number `last`: among those that have seen the least, the next in order.

    Plans are queued so that neighbors share the most. Where another process is at work in the same stretch, the
    middle of the longest stretch that nobody has begun is taken instead, so that each has neighbors of its own.
    """
    queue = [t for t in trials if t.state in (TrialState.WAITING, TrialState.RUNNING) and "key" in t.user_attrs]
    open_ = [t for t in queue if t.state == TrialState.WAITING and (wanted is None or t.user_attrs["key"] in wanted)]
    if not open_:
        return None
    seen = {trial.number: far(trial) for trial in open_}
    least = min(seen.values())
    free = {number for number, images in seen.items() if images == least}
    order = [trial for trial in queue if trial.number in free or trial.state == TrialState.RUNNING]
    following = next((trial for trial in order if last is not None and trial.number > last), None)
    if following is not None and following.number in free:
        return following
    stretches = [list(some) for is_free, some in groupby(order, lambda trial: trial.number in free) if is_free]
    longest = max(stretches, key=len)
    others = any(trial.state == TrialState.RUNNING for trial in order)
    return longest[len(longest) // 2 if others else 0]


def far(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(DONE, 0))


def claim(storage: BaseStorage, trial: FrozenTrial) -> bool:
    """Make a waiting trial ours, if nobody was faster; its owner is never unknown while it runs."""
    if storage.get_trial(trial._trial_id).state != TrialState.WAITING:  # what we know of it may be old
        return False
    try:
        storage.set_trial_user_attr(trial._trial_id, "owner", me())
        if not storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
            return False
        if storage.get_trial(trial._trial_id).user_attrs.get("owner") != me():  # another wanted it at the same time
            storage.set_trial_user_attr(trial._trial_id, "owner", me())
    except UpdateFinishedTrialError:
        return False
    return True


def release(storage: BaseStorage, trials: Sequence[FrozenTrial], lost: Callable[[Any], bool]) -> int:
    """Let trials wait again whose owner is lost; what they had finished of their examples stays."""
    found = [t for t in trials if t.state == TrialState.RUNNING and lost(t.user_attrs.get("owner"))]
    for trial in found:
        storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return len(found)


def me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's own count, so that a reused pid is not mistaken for the old process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def dead(owner: Mapping[str, Any] | None) -> bool:
    """Whether the owner of a trial is surely gone; on another machine we cannot know and assume that it lives."""
    if owner is None:
        return True
    if owner["host"] != socket.gethostname() or sys.platform == "win32":  # where signal 0 is Ctrl-C
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return bool(_started(owner["pid"]) != owner["since"])
