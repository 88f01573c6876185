"""A cache of all trials of a study, since a database with many of them takes seconds to read."""

from __future__ import annotations

import time
from collections.abc import Callable

from optuna.trial import FrozenTrial

PART = 20  # a reading is used for so many times the seconds it took: reading takes a twentieth of the time at most


class TrialCache:
    """All trials as of the last reading, with the changes that this process made since, but not those of others.

    Before a trial is changed, the storage must be asked again: one that waits here may be claimed by another process.
    """

    def __init__(self, read: Callable[[], list[FrozenTrial]]) -> None:
        self._read = read
        self._trials: list[FrozenTrial] = []
        self._until = 0.0

    def now(self) -> list[FrozenTrial]:
        """All trials, read from the storage."""
        began = time.monotonic()
        self._trials = list(self._read())
        ended = time.monotonic()
        self._until = ended + PART * (ended - began)
        return self._trials

    def lately(self) -> list[FrozenTrial]:
        """All trials from the cache, or from the storage where the cache is too old."""
        return self._trials if time.monotonic() < self._until else self.now()

    def changed(self, trial: FrozenTrial) -> None:
        """Put a trial that this process changed into the cache."""
        if trial.number < len(self._trials):
            self._trials[trial.number] = trial
