"""Study: trials in an Optuna storage with per-example scores in Parquet files; sweeps write it, analyses read it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import Size, size
from sensitivity.study import answers, records
from sensitivity.study import queue as turns
from sensitivity.study.scores import Score, difference, told
from sensitivity.study.storage import location
from sensitivity.study.storage.opening import ProcessLock, held, open_storage
from sensitivity.study.table import NATIVE, row
from sensitivity.study.trial_cache import TrialCache

NAME = "sensitivity"
EXAMPLE_COLUMNS = answers.COLUMNS


@dataclass(frozen=True)
class Asked:
    """A trial that this process has claimed, its plan, and how many clusters (images) of the examples it has seen."""

    trial: optuna.Trial
    plan: Plan
    done: int = 0


class Study:
    """Trials of one model on the same tasks, examples and seeds, in a folder (and, for a team, a database).

    Examples:
        >>> from sensitivity import Study
        >>> study = Study("runs/vqa")
        >>> study.counts()["done"]
        28
        >>> sorted(study.table()[["bpw", "vqa", "vqa.low", "vqa.high"]].columns)
        ['bpw', 'vqa', 'vqa.high', 'vqa.low']
    """

    def __init__(self, path: Path | str, storage: str | None = None) -> None:
        self.path = Path(path)
        storage = storage or location.address(self.path)
        if storage is None and not (self.path / "journal.log").exists():
            raise UserError(f"no study at {self.path}; `sensitivity sweep MODEL --out {self.path}` makes one")
        self._storage = open_storage(
            storage or self.path / "journal.log", known=location.address(self.path) is not None
        )
        try:
            self._optuna = optuna.load_study(study_name=NAME, storage=self._storage)
        except KeyError:
            raise UserError(f"{self.path} holds no study: it was never begun, or its first lines are lost") from None
        attrs = self._optuna.user_attrs
        if not {"meta", "tasks", "parts"} <= set(attrs):
            raise UserError(f"{self.path} was interrupted before its first trial; delete it and start again")
        self.parts = records.identity(attrs, self._optuna.directions, self.path)
        self.meta: dict[str, Any] = attrs["meta"]
        self.tasks: tuple[str, ...] = tuple(attrs["tasks"])
        self._again = frozenset(attrs.get(records.AGAIN, ()))
        self._records = records.Records(self.path, self.tasks, self.parts.names)
        self._glance = TrialCache(lambda: self._records.checked(self._optuna.get_trials(deepcopy=False)))
        self._told: set[str] = set()
        self._deltas: dict[tuple[str, str, int, int], Score | None] = {}

    @classmethod
    def create(
        cls,
        path: Path | str,
        parts: ComponentMap,
        tasks: Sequence[str],
        meta: Mapping[str, Any],
        storage: str | None = None,
    ) -> Study:
        """Create a study, or open an existing one if its model, tasks and settings are the same."""
        path = Path(path)
        storage = location.usable(path, storage)
        with location.made(path):
            known = location.address(path) is not None
            backend = open_storage(storage or path / "journal.log", known)
            if storage is not None and not known:
                location.write(path, storage)
            cls._begin(path, parts, tasks, meta, backend)
        return cls(path, storage)

    @staticmethod
    def _begin(
        path: Path, parts: ComponentMap, tasks: Sequence[str], meta: Mapping[str, Any], backend: BaseStorage
    ) -> None:
        """Store what the study is about, or compare it with what an earlier process stored."""
        # one maximized value per task, and bits per weight as the last, minimized one
        directions = [StudyDirection.MAXIMIZE] * len(tasks) + [StudyDirection.MINIMIZE]
        wanted = json.loads(json.dumps({"meta": dict(meta), "tasks": list(tasks), "parts": parts.to_json()}))
        with held(ProcessLock(path / "queue")):  # processes that start together all find nothing stored
            study = optuna.create_study(study_name=NAME, storage=backend, directions=directions, load_if_exists=True)
            for name, value in wanted.items():
                found = study.user_attrs.get(name)
                if found is None:
                    study.set_user_attr(name, value)
                elif found != value:
                    why = _difference(name, found, value)
                    raise UserError(f"{path} holds another study ({why}); choose another --out")

    # -- asking and telling ---------------------------------------------------------------------------------------

    @property
    def optuna_study(self) -> optuna.Study:
        """The same study as Optuna's own object, for its tools."""
        return self._optuna

    def enqueue(self, plans: Iterable[Plan]) -> int:
        """Queue the plans that are not yet done, queued or running; return how many were added."""
        with held(ProcessLock(self.path / "queue")):  # else two processes could queue the same plan
            return self._enqueue(plans)

    def _enqueue(self, plans: Iterable[Plan]) -> int:
        self._put_aside_damaged()
        known = {t.user_attrs.get("key") for t in self._counted(self._glance.now()) if t.state != TrialState.FAIL}
        added = 0
        for plan in plans:
            if plan.key not in known:
                self._optuna.enqueue_trial(plan.bits(NATIVE), user_attrs={"key": plan.key, "plan": plan.to_json()})
                known.add(plan.key)
                added += 1
        if added:
            self._glance.now()
        return added

    def ask(self, last: Asked | None = None, wanted: Container[str] | None = None) -> Asked | None:
        """Claim the waiting plan that shares the most work with the last one; None when no wanted plan waits."""
        while (found := self._next(last, wanted)) is not None:
            with held(ProcessLock(self.path / "queue")):  # `release` must not see a claim half done
                ours = turns.claim(self._storage, found)
            now = self._heard(found._trial_id)
            if not ours:
                continue
            trial = optuna.Trial(self._optuna, found._trial_id)
            plan = Plan.from_json(found.user_attrs["plan"])
            if self._elsewhere(found.number, plan.key):  # queued twice, by processes without a common lock
                self._optuna.tell(trial, state=TrialState.PRUNED)
                self._heard(found._trial_id)
                continue
            # Optuna writes the parameters that a trial was queued with only when each of them is suggested
            for name, widths in self.distributions.items():
                trial._suggest(name, widths)
            return Asked(trial, plan, turns.far(now))
        return None

    def _heard(self, trial_id: int) -> FrozenTrial:
        """A trial that we changed, as the storage has it now; updates the cache."""
        trial = self._storage.get_trial(trial_id)
        self._glance.changed(trial)
        return trial

    def _next(self, last: Asked | None, wanted: Container[str] | None) -> FrozenTrial | None:
        """The trial to claim: by the cache, then by the storage, then among claims that we do not know of."""
        number = last.trial.number if last else None
        found = turns.choose(self._glance.lately(), number, wanted)
        if found is None:  # the cache may lack trials that others queued or released
            found = turns.choose(self._glance.now(), number, wanted)
        if found is None and self._release(lambda owner: bool(owner == turns.me())):
            # a claim of ours that the database carried out while the connection was lost, so that we never heard of it
            found = turns.choose(self._glance.now(), number, wanted)
        return found

    def _elsewhere(self, number: int, key: str) -> bool:
        """Whether a plan is finished in another trial, or waits or runs in an earlier one."""
        found = [t for t in self._glance.lately() if t.user_attrs.get("key") == key and t.number != number]
        if found:
            self._again = frozenset(self._optuna.user_attrs.get(records.AGAIN, ()))  # others may have added to it
            found = self._counted(found)
        over = (TrialState.FAIL, TrialState.PRUNED)
        return any(t.state == TrialState.COMPLETE or (t.number < number and t.state not in over) for t in found)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's parameters of a trial: the bits of each component."""
        return {name: IntDistribution(1, NATIVE) for name in self.parts.names}

    def tell(
        self,
        asked: Asked,
        examples: Mapping[str, Sequence[Any]],
        facts: Mapping[str, Any],
        done: int | None = None,
    ) -> dict[str, float]:
        """Store a trial's answers and scores and finish it; with `done`, the clusters it has seen, queue it again.

        The answers are written first: where a process was killed in between, no scores without answers remain.
        """
        frame = pd.DataFrame(dict(examples), columns=list(answers.COLUMNS))
        if asked.done:
            before = self._answers(asked.plan)
            # an example is in both where a process was killed after writing its answers and before storing `done`
            new = set(zip(frame["task"], frame["example"], strict=True))
            again = [one in new for one in zip(before["task"], before["example"], strict=True)]
            frame = pd.concat([before[~np.array(again, dtype=bool)], frame], ignore_index=True)
        answers.write(self._file(asked.plan.key), frame)
        scores = {str(task): told(rows) for task, rows in frame.groupby("task", sort=False)}
        weight = size(self.parts, asked.plan)
        facts = {**facts, "seconds": facts.get("seconds", 0.0) + asked.trial.user_attrs.get("seconds", 0.0)}
        # scores last: a trial with scores is read by others, who rely on all the rest
        for name, value in {"size": weight.to_json(), **facts, "scores": scores}.items():
            if asked.trial.user_attrs.get(name) != value:
                asked.trial.set_user_attr(name, value)
        means = {task: float(scores[task]["mean"]) for task in self.tasks}
        if done is None:
            self._optuna.tell(asked.trial, [*means.values(), weight.bpw])
        else:
            # before the state: once it waits, another process may claim it, and must know where to go on
            asked.trial.set_user_attr(turns.DONE, done)
            self._storage.set_trial_state_values(asked.trial._trial_id, TrialState.WAITING)
        self._heard(asked.trial._trial_id)
        return means

    def append(self, plans: Sequence[Plan], scores: Sequence[Mapping[str, float]]) -> None:
        """Add finished trials of which only mean scores are known; repeated plans stay separate trials (replicates)."""
        trials = []
        for plan, means in zip(plans, scores, strict=True):
            weight = size(self.parts, plan)
            known = {task: {"mean": float(means[task])} for task in self.tasks}
            attrs = {"key": plan.key, "plan": plan.to_json(), "size": weight.to_json(), "scores": known}
            values = [*(known[task]["mean"] for task in self.tasks), weight.bpw]
            trials.append(
                optuna.trial.create_trial(
                    values=values, params=plan.bits(NATIVE), distributions=self.distributions, user_attrs=attrs
                )
            )
        self._optuna.add_trials(trials)

    def give_up(self, asked: Asked, why: str) -> None:
        """Mark a trial as failed, with the reason."""
        asked.trial.set_user_attr("failure", why)
        self._optuna.tell(asked.trial, state=TrialState.FAIL)
        self._heard(asked.trial._trial_id)

    def put_back(self, asked: Asked) -> None:
        """Queue an interrupted trial again."""
        self._storage.set_trial_state_values(asked.trial._trial_id, TrialState.WAITING)
        self._heard(asked.trial._trial_id)

    def release_lost(self, owner: Mapping[str, Any] | None = None) -> int:
        """Queue again the trials of processes that died on this machine, or of the given process; return how many."""
        return self._release(turns.dead if owner is None else lambda other: bool(other == owner))

    def _release(self, lost: Callable[[Any], bool]) -> int:
        with held(ProcessLock(self.path / "queue")):
            return turns.release(self._storage, self._glance.now(), lost)

    # -- reading --------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Finished trials, in the order in which they were queued."""
        return [trial for trial in self._counted(self._glance.now()) if trial.state == TrialState.COMPLETE]

    def measured(self) -> list[FrozenTrial]:
        """Finished trials, and those that have scores from a part of their examples."""
        over = (TrialState.FAIL, TrialState.PRUNED)
        trials = self._counted(self._glance.now())
        return [trial for trial in trials if trial.state not in over and "scores" in trial.user_attrs]

    def _counted(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """All trials but those whose answers were lost, and whose plans are run again."""
        return [trial for trial in trials if trial.number not in self._again]

    def unmeasured(self) -> set[str]:
        """The keys of plans that are queued or running and have no score yet."""
        open_ = (TrialState.WAITING, TrialState.RUNNING)
        trials = [trial for trial in self._glance.now() if trial.state in open_ and "scores" not in trial.user_attrs]
        return {str(trial.user_attrs.get("key")) for trial in trials}

    def counts(self, lately: bool = False) -> dict[str, int]:
        """How many plans are done, waiting and running; `lately` reads the cache, which may lack changes by others."""
        trials = self._counted(self._glance.lately() if lately else self._glance.now())
        states = {"done": TrialState.COMPLETE, "waiting": TrialState.WAITING, "running": TrialState.RUNNING}
        return {name: sum(t.state == state for t in trials) for name, state in states.items()}

    def progress(self, total: int, wanted: Container[str] | None = None) -> tuple[int, int]:
        """Images that all trials have seen, and that wanted trials have still to see; a finished one saw `total`."""
        over = (TrialState.FAIL, TrialState.PRUNED)
        trials = [trial for trial in self._counted(self._glance.lately()) if trial.state not in over]
        seen = [total if trial.state == TrialState.COMPLETE else turns.far(trial) for trial in trials]
        going = [wanted is None or trial.user_attrs.get("key") in wanted for trial in trials]
        return sum(seen), sum(total - far for far, goes in zip(seen, going, strict=True) if goes)

    def table(self) -> pd.DataFrame:
        """One row per measured trial: bits per component, size, and per task the score and its interval (see `row`)."""
        native = self.examples(self.native)
        return pd.DataFrame([row(trial, self.tasks, partial(self.apart, native)) for trial in self.measured()])

    def apart(self, native: pd.DataFrame | None, plan: Plan, task: str, n: int | None) -> Score | None:
        """A plan's paired difference to full precision, cached until either has seen more examples."""
        if native is None or n is None:
            return None
        known = plan.key, task, n, len(native)
        if known not in self._deltas:
            self._deltas[known] = difference(self.examples(plan), native, task)
        return self._deltas[known]

    def compare(self, plan: Plan, base: Plan, task: str) -> Score | None:
        """The paired difference in a task's score between two plans; None without per-example scores."""
        return difference(self.examples(plan), self.examples(base), task)

    def plan(self, number: int) -> Plan:
        """The plan of a trial, by the trial's number."""
        return Plan.from_json(self._optuna.get_trials(deepcopy=False)[number].user_attrs["plan"])

    def examples(self, plan: Plan) -> pd.DataFrame | None:
        """Per-example scores of a measured plan; None where only the means are known (an imported table).

        Damaged ones count as missing, with one warning; the next sweep runs the plan again.
        """
        path = self._file(plan.key)
        if not path.exists():
            return None
        try:
            return answers.read(path)
        except answers.Damaged as error:
            self._lost(f"the answers of the plan {plan.describe()} are damaged ({path}: {error})")
            return None

    def _answers(self, plan: Plan) -> pd.DataFrame:
        """Per-example scores that further examples are added to: missing or damaged ones are an error."""
        try:
            return answers.read(self._file(plan.key))
        except answers.Damaged as error:
            raise UserError(
                f"the answers of the plan {plan.describe()} are damaged ({self._file(plan.key)}: {error}); the same "
                "command runs that plan again"
            ) from error

    def _file(self, key: str) -> Path:
        return self.path / "examples" / f"{key}.parquet"

    def _lost(self, what: str) -> None:
        """Warn that answers are lost, once for each plan."""
        if what not in self._told:
            self._told.add(what)
            end = "its mean scores still count, and the same sweep command runs that plan again"
            warnings.warn(f"{what}; {end}", Notice, stacklevel=3)

    def _put_aside_damaged(self) -> None:
        """Stop counting trials whose answers are lost, so that their plans are queued again; needs the queue's lock."""
        over = [t for t in self.measured() if t.state != TrialState.RUNNING and records.has_answers(t, self.tasks)]
        gone = [trial for trial in over if not self._readable(trial)]
        for trial in gone:  # Optuna cannot change a finished trial: the study lists its number instead
            if trial.state != TrialState.COMPLETE:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        if gone:
            self._again |= {trial.number for trial in gone}
            self._optuna.set_user_attr(records.AGAIN, sorted(self._again))
            self._glance.now()

    def _readable(self, trial: FrozenTrial) -> bool:
        """Whether a trial's answers can be read; warns where they cannot."""
        path = self._file(trial.user_attrs["key"])
        try:
            return len(answers.read(path)) > 0
        except answers.Damaged as error:
            plan = Plan.from_json(trial.user_attrs["plan"]).describe()
            told = f"the answers of the plan {plan} are damaged ({path}: {error}); that plan is run again"
            warnings.warn(told, Notice, stacklevel=2)
            return False

    @property
    def native(self) -> Plan:
        """The plan that quantizes nothing."""
        return Plan.uniform(self.parts, None)


def _difference(name: str, found: Any, wanted: Any) -> str:
    """Where two JSON values first differ, for an error message."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*found, *wanted]:
            if found.get(key) != wanted.get(key):
                return _difference(key, found.get(key), wanted.get(key))
    short = [text if len(text := str(value)) < 60 else text[:57] + "..." for value in (found, wanted)]
    return f"{name}: there {short[0]}, here {short[1]}"


__all__ = ["EXAMPLE_COLUMNS", "NATIVE", "Asked", "Score", "Size", "Study"]
