"""The queue of a study: which waiting trial a process claims next, and how trials of dead processes are released."""

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

DONE = "done"  # user attribute: how many clusters (images) of the examples a trial has seen


def choose(trials: Sequence[FrozenTrial], last: int | None, wanted: Container[str] | None = None) -> FrozenTrial | None:
    """The waiting trial to claim after trial number `last`: the next in order of those that saw the fewest examples.

    Plans are queued so that neighbors share the most work. Where the next trial is already running in another
    process, that process works through this stretch. Then the middle of the longest waiting stretch is chosen, so
    that each process has neighbors of its own.
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
    """How many clusters of the examples a trial has seen."""
    return int(trial.user_attrs.get(DONE, 0))


def claim(storage: BaseStorage, trial: FrozenTrial) -> bool:
    """Claim a waiting trial for this process; False where another process was faster.

    The owner is written before the state: a running trial without an owner would look lost and be released by others.
    """
    if storage.get_trial(trial._trial_id).state != TrialState.WAITING:  # `trial` may come from the cache
        return False
    try:
        storage.set_trial_user_attr(trial._trial_id, "owner", me())
        # the change of state decides: the storage lets only one process make it
        if not storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
            return False
        if storage.get_trial(trial._trial_id).user_attrs.get("owner") != me():  # the loser wrote after us
            storage.set_trial_user_attr(trial._trial_id, "owner", me())
    except UpdateFinishedTrialError:
        return False
    return True


def release(storage: BaseStorage, trials: Sequence[FrozenTrial], lost: Callable[[Any], bool]) -> int:
    """Queue running trials again whose owner is lost, and return their number; the examples they have seen stay."""
    found = [t for t in trials if t.state == TrialState.RUNNING and lost(t.user_attrs.get("owner"))]
    for trial in found:
        storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return len(found)


def me() -> dict[str, Any]:
    """This process as the owner of a trial."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks: a new process may get the pid of a dead one."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def dead(owner: Mapping[str, Any] | None) -> bool:
    """Whether the owner of a trial has certainly ended; one on another machine cannot be seen and counts as alive."""
    if owner is None:
        return True
    if owner["host"] != socket.gethostname() or sys.platform == "win32":  # on Windows, signal 0 is Ctrl-C
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process has this pid; its start tells whether it is the owner
        pass
    return bool(_started(owner["pid"]) != owner["since"])
