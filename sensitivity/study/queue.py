"""The queue of a study: which waiting trial a process claims next, and how trials of dead processes are released."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from sensitivity.spec.plan import Plan
from sensitivity.study.owner import Owner, this_process
from sensitivity.study.storage import paths
from sensitivity.study.storage.process_lock import ProcessLock, held
from sensitivity.study.stored_trials import StoredTrials
from sensitivity.study.trial import ABANDONED, Trial


class Queue:
    """Plans wait in it until a process claims them, and are queued again if that process dies."""

    def __init__(self, study: Path, trials: StoredTrials) -> None:
        self._study, self._trials = study, trials

    def lock(self) -> ProcessLock:
        """The lock for changes that no two processes may make at once."""
        return ProcessLock(self._study / paths.QUEUE_LOCK)

    def add(self, plans: Iterable[Plan]) -> int:
        """Queue the plans that are not yet done, queued or running; return how many were added; needs the lock."""
        present = {trial.key for trial in self._trials.now() if trial.state != TrialState.FAIL}
        added = 0
        for plan in plans:
            if plan.key not in present:
                self._trials.add(Trial.of(plan))
                present.add(plan.key)
                added += 1
        if added:
            self._trials.now()  # so that the cache has them, too
        return added

    def next(self, last: Trial | None, wanted: Container[str] | None) -> Trial | None:
        """Claim the waiting trial that shares the most work with the last one; None when no wanted plan waits."""
        while (waiting := self._waiting(last, wanted)) is not None:
            with held(self.lock()):  # else `release` could see a claim half done
                trial = claim(self._trials, waiting)
            if trial is None:
                self._trials.read(waiting)
                continue
            if self._is_elsewhere(trial):  # queued twice, by processes without a common lock
                self._trials.end(trial, state=TrialState.PRUNED)
                continue
            self._trials.suggest(trial)
            return trial
        return None

    def _waiting(self, last: Trial | None, wanted: Container[str] | None) -> Trial | None:
        """The trial to claim: from the cache, else from the storage, else one whose earlier claim was lost."""
        number = last.number if last else None
        trial = choose(self._trials.cached(), number, wanted)
        if trial is None:  # the cache may lack trials that others queued or released
            trial = choose(self._trials.now(), number, wanted)
        if trial is None and self.release(lambda owner: owner == this_process()):
            # the database carried out an earlier claim of ours, but its reply was lost with the connection
            trial = choose(self._trials.now(), number, wanted)
        return trial

    def _is_elsewhere(self, trial: Trial) -> bool:
        """Whether a trial's plan is finished in another trial, or waits or runs in an earlier one."""
        others = [t for t in self._trials.cached() if t.key == trial.key and t.number != trial.number]
        if others:
            self._trials.read_discarded()
            others = self._trials.without_discarded(others)
        return any(
            t.state == TrialState.COMPLETE or (t.number < trial.number and t.state not in ABANDONED) for t in others
        )

    def release(self, is_lost: Callable[[Owner | None], bool]) -> int:
        """Queue the running trials again whose owner is lost, and return how many; their answers so far are kept."""
        with held(self.lock()):
            lost = [t for t in self._trials.now() if t.state == TrialState.RUNNING and is_lost(t.owner)]
            for trial in lost:
                self._trials.requeue(trial)
            return len(lost)


def choose(trials: Sequence[Trial], last: int | None, wanted: Container[str] | None = None) -> Trial | None:
    """The waiting trial to claim after trial number `last`: the next in order of those that saw the fewest examples.

    Plans are queued so that neighbors share the most work. If another process already runs the next trial, that
    process works through this stretch of the queue. Then the middle of the longest stretch of waiting trials is
    chosen, so that each process has neighbors of its own.
    """
    queue = [trial for trial in trials if trial.is_open]
    waiting = [t for t in queue if t.state == TrialState.WAITING and (wanted is None or t.key in wanted)]
    if not waiting:
        return None
    least = min(trial.done for trial in waiting)
    free = {trial.number for trial in waiting if trial.done == least}
    order = [trial for trial in queue if trial.number in free or trial.state == TrialState.RUNNING]
    following = next((trial for trial in order if last is not None and trial.number > last), None)
    if following is not None and following.number in free:
        return following
    stretches = [list(some) for is_free, some in groupby(order, lambda trial: trial.number in free) if is_free]
    longest = max(stretches, key=len)
    others = any(trial.state == TrialState.RUNNING for trial in order)
    return longest[len(longest) // 2 if others else 0]


def claim(trials: StoredTrials, trial: Trial) -> Trial | None:
    """Claim a waiting trial for this process, and return it as it runs; None where another process was faster.

    The owner is written before the state: a running trial without an owner would look lost and be released by others.
    """
    waiting = trials.read(trial)  # `trial` may come from the cache
    if waiting.state != TrialState.WAITING:
        return None
    ours = this_process()
    try:
        trials.change(waiting, replace(waiting, owner=ours))
        # the change of state decides: the storage lets only one process make it
        if not trials.start(waiting):
            return None
        running = trials.read(waiting)
        trials.change(running, replace(running, owner=ours))  # a slower process may have replaced it
    except UpdateFinishedTrialError:
        return None
    return replace(running, owner=ours)
