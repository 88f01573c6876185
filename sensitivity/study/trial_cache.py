"""A cache of all trials of a study, since a database with many of them takes seconds to read."""

from __future__ import annotations

import time
from collections.abc import Callable

from sensitivity.study.trial import Trial

AGE_PER_READ = 20  # the cache is used for 20 times the seconds that reading took: reads take about 5 % of the time


class TrialCache:
    """All trials as they were last read, with the changes that this process made since, but not those of others.

    Before a trial is changed, it must be read from the storage: one that waits here may be claimed by another process.
    """

    def __init__(self, read: Callable[[], list[Trial]]) -> None:
        self._read = read
        self._trials: dict[int, Trial] = {}
        self._until = 0.0

    def now(self) -> list[Trial]:
        """All trials, read from the storage."""
        began = time.monotonic()
        self._trials = {trial.number: trial for trial in self._read()}
        ended = time.monotonic()
        self._until = ended + AGE_PER_READ * (ended - began)
        return list(self._trials.values())

    def cached(self) -> list[Trial]:
        """All trials from the cache, or from the storage where the cache is too old."""
        return list(self._trials.values()) if time.monotonic() < self._until else self.now()

    def update(self, trial: Trial) -> None:
        """Put a trial that this process changed into the cache."""
        if trial.number in self._trials:
            self._trials[trial.number] = trial
