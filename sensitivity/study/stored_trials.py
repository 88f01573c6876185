"""The trials of a study as records: read through a cache, and changed in both the storage and the cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from sensitivity.study import identity
from sensitivity.study.trial import NATIVE, Trial, TrialReader, enqueue, finished, write
from sensitivity.study.trial_cache import TrialCache


class StoredTrials:
    """All trials of a study but the discarded ones, whose answers were lost and whose plans are run again."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, reader: TrialReader) -> None:
        self._study, self._storage, self._reader = study, storage, reader
        self._discarded = identity.discarded(study)
        self._cache = TrialCache(lambda: reader.read_all(study.get_trials(deepcopy=False)))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's parameters of a trial: the bits of each component."""
        return {name: IntDistribution(1, NATIVE) for name in self._reader.parts.names}

    def now(self) -> list[Trial]:
        """All trials, read from the storage, in the order in which they were queued."""
        return self.without_discarded(self._cache.now())

    def cached(self) -> list[Trial]:
        """All trials from the cache, which may lack changes by other processes."""
        return self.without_discarded(self._cache.cached())

    def without_discarded(self, trials: Iterable[Trial]) -> list[Trial]:
        """These trials without the discarded ones."""
        return [trial for trial in trials if trial.number not in self._discarded]

    def add(self, trial: Trial) -> None:
        """Store a new trial, which waits to be run."""
        enqueue(self._study, trial)

    def add_finished(self, trials: Sequence[Trial]) -> None:
        """Store trials that were measured elsewhere."""
        self._study.add_trials([finished(trial, self.distributions) for trial in trials])

    def read(self, trial: Trial) -> Trial:
        """The trial as the storage has it now."""
        stored = self._reader.read(self._storage.get_trial(trial.id))
        assert stored is not None, "a trial that was read has a plan"
        self._cache.update(stored)
        return stored

    def change(self, before: Trial, after: Trial) -> None:
        """Store what has changed in a trial, apart from its state."""
        write(self._storage, before, after)

    def start(self, trial: Trial) -> bool:
        """Make a waiting trial a running one; False where another process did so first."""
        return self._storage.set_trial_state_values(trial.id, TrialState.RUNNING)

    def requeue(self, trial: Trial) -> None:
        """Make a running trial a waiting one."""
        self._storage.set_trial_state_values(trial.id, TrialState.WAITING)
        self.read(trial)

    def suggest(self, trial: Trial) -> None:
        """Write the parameters that a trial was queued with: Optuna does so only when each of them is suggested."""
        running = optuna.Trial(self._study, trial.id)
        for name, widths in self.distributions.items():
            running._suggest(name, widths)

    def end(self, trial: Trial, values: Sequence[float] | None = None, state: TrialState = TrialState.COMPLETE) -> None:
        """End a running trial: with its values, or with the state of one that has none."""
        self._study.tell(trial.number, values, None if values else state)
        self.read(trial)

    def discard(self, trials: Sequence[Trial]) -> None:
        """Stop counting trials whose answers are lost."""
        for trial in trials:
            if trial.state != TrialState.COMPLETE:  # a finished one cannot be changed
                self._storage.set_trial_state_values(trial.id, TrialState.FAIL)
        if trials:
            self._discarded |= {trial.number for trial in trials}
            identity.discard(self._study, self._discarded)
            self._cache.now()

    def read_discarded(self) -> None:
        """Read again which trials no longer count: another process may have added to them."""
        self._discarded = identity.discarded(self._study)
