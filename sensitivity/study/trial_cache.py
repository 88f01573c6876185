"""All trials of a study as they were a short while ago: a database of many plans takes seconds to read."""

from __future__ import annotations

import time
from collections.abc import Callable

from optuna.trial import FrozenTrial

PART = 20  # times as long as a reading took, it may be looked at: so reading takes at most a twentieth of the time


class TrialCache:
    """What others did since the last reading is missing, what this process did is not.

    Whoever acts on it must ask the storage again: a trial that waits here may have been taken by another process.
    """

    def __init__(self, read: Callable[[], list[FrozenTrial]]) -> None:
        self._read = read
        self._trials: list[FrozenTrial] = []
        self._until = 0.0

    def now(self) -> list[FrozenTrial]:
        began = time.monotonic()
        self._trials = list(self._read())
        ended = time.monotonic()
        self._until = ended + PART * (ended - began)
        return self._trials

    def lately(self) -> list[FrozenTrial]:
        return self._trials if time.monotonic() < self._until else self.now()

    def changed(self, trial: FrozenTrial) -> None:
        """This process changed a trial, and this is what became of it."""
        if trial.number < len(self._trials):
            self._trials[trial.number] = trial
