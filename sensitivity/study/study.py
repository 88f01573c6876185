"""Study: trials in an Optuna storage with per-example scores in Parquet files; sweeps write it, analyses read it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import TrialState

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, check_is, shell_word, unknown
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.rules import size_for
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import Size
from sensitivity.study import identity
from sensitivity.study.answers import Answers
from sensitivity.study.examples.answer_counts import AnswerCounts, count_answers, counts_by_kind
from sensitivity.study.owner import Owner, is_dead
from sensitivity.study.queue import Queue
from sensitivity.study.scores import Score, difference, task_score
from sensitivity.study.storage import location, paths
from sensitivity.study.storage.opening import close, open_storage
from sensitivity.study.storage.process_lock import held
from sensitivity.study.stored_trials import StoredTrials
from sensitivity.study.table import row
from sensitivity.study.trial import ABANDONED, NATIVE, RunFacts, Trial, TrialReader, numbers_and_keys, one_per_plan


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
        address = location.address(self.path)
        storage = storage or address
        if storage is None and not (self.path / paths.JOURNAL).exists():
            remedy = f"`sensitivity sweep MODEL --out {shell_word(self.path)}` makes one, and so does `plan`"
            raise UserError(f"no study at {self.path}; {remedy}")
        self._storage = open_storage(storage or self.path / paths.JOURNAL, wait=address is not None)
        self._optuna, about = identity.load(self.path, self._storage)
        self.meta, self.tasks, self.parts = about.meta, about.tasks, about.parts
        self.runtime = about.runtime  # whose files sizes count
        reader = TrialReader(self.path, self.tasks, self.parts, self.runtime)
        self._trials = StoredTrials(self._optuna, self._storage, reader)
        self._queue = Queue(self.path, self._trials)
        self._answers = Answers(self.path)
        self._compared: dict[tuple[str, str, int, int], tuple[Score | None, AnswerCounts | None]] = {}

    @classmethod
    def begun(cls, path: Path | str) -> Study | None:
        """The study in a folder; None where there is none, or one that was interrupted before its first trial."""
        with suppress(identity.NotBegun):
            return cls(path) if paths.is_study(Path(path)) else None
        return None

    def __repr__(self) -> str:
        plans = ", ".join(f"{number:,} {state}" for state, number in self.counts().items())
        return f"<Study {self.path} of {self.parts.model} on {', '.join(self.tasks)}: plans {plans}>"

    @classmethod
    def create(
        cls,
        path: Path | str,
        parts: ComponentMap,
        tasks: Sequence[str],
        meta: Mapping[str, object],
        storage: str | None = None,
        runtime: str | None = None,
    ) -> Study:
        """Create a study, or open an existing one if its model, tasks and settings are the same.

        With `runtime`, sizes are counted in the files that it loads; None keeps the runtime of an existing study.
        """
        path = Path(path)
        storage = location.reachable_database(path, storage)
        with location.study_folder(path):
            address = location.address(path)
            backend = open_storage(storage or path / paths.JOURNAL, wait=address is not None)
            try:
                if storage is not None and address is None:
                    location.write_address(path, storage)
                identity.store_or_compare(path, parts, tasks, meta, backend, runtime)
            finally:
                close(backend)  # else a database's connection stays open until it is garbage-collected
        return cls(path, storage)

    def check_model(self, name: str, fingerprint: str) -> None:
        """Raise an error unless this is the model that the study was measured on."""
        if self.meta.get("fingerprint") != fingerprint:
            raise UserError(f"{self.path} was measured on {self.meta.get('model')}, and {name} is another model")

    # -- queueing and running -------------------------------------------------------------------------------------

    @property
    def optuna_study(self) -> optuna.Study:
        """The same study as Optuna's own object, for its tools."""
        return self._optuna

    def enqueue(self, plans: Iterable[Plan]) -> int:
        """Queue the plans that are not yet done, queued or running; return how many were added."""
        with held(self._queue.lock()):  # else two processes could queue the same plan
            self._discard_damaged()
            return self._queue.add(plans)

    def ask(self, last: Trial | None = None, wanted: Container[str] | None = None) -> Trial | None:
        """Claim the waiting plan that shares the most work with the last one; None when no wanted plan waits."""
        return self._queue.next(last, wanted)

    def tell(
        self, trial: Trial, examples: Mapping[str, Sequence[object]], facts: RunFacts, done: int | None = None
    ) -> dict[str, float]:
        """Store a trial's answers and scores and end it; with `done` (clusters seen so far), queue it again instead.

        The answers are written first: if the process is killed in between, no scores without answers remain.
        """
        frame = self._answers.add(trial, examples)
        plan_size = self.size(trial.plan)
        measured = replace(
            replace(trial, **facts),
            seconds=facts.get("seconds", 0.0) + (trial.seconds or 0.0),
            size=plan_size.to_json(),
            scores={str(task): task_score(rows) for task, rows in frame.groupby("task", sort=False)},
            done=trial.done if done is None else done,
        )
        self._trials.change(trial, measured)
        means = {task: float(measured.scores[task]["mean"]) for task in self.tasks}
        if done is None:
            self._trials.end(trial, [*means.values(), plan_size.bpw])
        else:
            # after `done` is stored: once the trial waits, another process may claim it and must know where to continue
            self._trials.requeue(trial)
        return means

    def append(self, plans: Sequence[Plan], scores: Sequence[Mapping[str, float]]) -> None:
        """Add finished trials of which only mean scores are known; repeated plans stay separate trials (replicates)."""
        trials = []
        for plan, means in zip(plans, scores, strict=True):
            plan_size = self.size(plan)
            values = [float(means[task]) for task in self.tasks]
            trials.append(
                replace(
                    Trial.of(plan),
                    size=plan_size.to_json(),
                    scores={task: {"mean": mean} for task, mean in zip(self.tasks, values, strict=True)},
                    values=(*values, plan_size.bpw),
                )
            )
        self._trials.add_finished(trials)

    def give_up(self, trial: Trial, why: str) -> None:
        """Mark a trial as failed, with the reason."""
        self._trials.change(trial, replace(trial, failure=why))
        self._trials.end(trial, state=TrialState.FAIL)

    def requeue(self, trial: Trial) -> None:
        """Queue an interrupted trial again."""
        self._trials.requeue(trial)

    def release_lost(self, owner: Owner | None = None) -> int:
        """Queue again the trials of processes that died on this machine, or of the given process; return how many."""
        return self._queue.release(is_dead if owner is None else lambda other: other == owner)

    def _discard_damaged(self) -> None:
        """Stop counting trials whose answers are lost, so that their plans are queued again; needs the queue's lock."""
        idle = [trial for trial in self.measured() if trial.state != TrialState.RUNNING and trial.has_answers]
        self._trials.discard([trial for trial in idle if not self._answers.is_whole(trial)])

    # -- reading --------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """Finished trials, in the order in which they were queued."""
        return [trial for trial in self._trials.now() if trial.state == TrialState.COMPLETE]

    def measured(self) -> list[Trial]:
        """One trial for each plan that has scores, if only from a part of its examples, or means of repetitions."""
        return one_per_plan(self.measurements())

    def measurements(self) -> list[Trial]:
        """All trials that have scores: where an imported table repeats a plan, each repetition is one."""
        return [trial for trial in self._trials.now() if trial.scores and trial.state not in ABANDONED]

    def unmeasured(self) -> set[str]:
        """The keys of plans that are queued or running and have no score yet."""
        return {trial.key for trial in self._trials.now() if trial.is_open and not trial.scores}

    def counts(self, cached: bool = False) -> dict[str, int]:
        """How many plans are done, waiting and running; `cached` reads the cache, which may lack changes by others."""
        trials = self._trials.cached() if cached else self._trials.now()
        states = {"done": TrialState.COMPLETE, "waiting": TrialState.WAITING, "running": TrialState.RUNNING}
        return {name: len({trial.key for trial in trials if trial.state == state}) for name, state in states.items()}

    def stopped(self) -> int:
        """How many running plans have lost their process, which ended on this machine; a sweep queues them again."""
        return sum(trial.state == TrialState.RUNNING and is_dead(trial.owner) for trial in self._trials.now())

    def is_deserted(self) -> bool:
        """Whether every process that ever ran a plan has ended; one on another machine counts as alive."""
        return all(is_dead(trial.owner) for trial in self._trials.now() if trial.owner is not None)

    def progress(self, total: int, wanted: Container[str] | None = None) -> tuple[int, int]:
        """How many images all trials have seen, and how many the wanted trials have yet to see.

        `total` is what a finished trial has seen.
        """
        trials = [trial for trial in self._trials.cached() if trial.state not in ABANDONED]
        seen = [total if trial.state == TrialState.COMPLETE else trial.done for trial in trials]
        left = [
            total - images for images, trial in zip(seen, trials, strict=True) if wanted is None or trial.key in wanted
        ]
        return sum(seen), sum(left)

    def table(self) -> pd.DataFrame:
        """One row per measured plan: bits per component, size, and per task the score and its interval (see `row`)."""
        native = self.examples(self.native)
        against_native = partial(self.difference_to_native, native), partial(self.counts_against_native, native)
        trials = self.measured()
        rows = pd.DataFrame([row(trial, self.parts, self.tasks, *against_native) for trial in trials])
        # a plan that does not round what others round has 16 bits there
        rounded = list(dict.fromkeys(name for trial in trials for name in trial.plan.rounded_bits()))
        return rows.fillna(dict.fromkeys(rounded, NATIVE))

    def difference_to_native(self, native: pd.DataFrame | None, plan: Plan, task: str, n: int | None) -> Score | None:
        """A plan's paired difference to full precision, cached until either has seen more examples."""
        return None if native is None or n is None else self._against(native, plan, task, n)[0]

    def counts_against_native(
        self, native: pd.DataFrame | None, plan: Plan, task: str, n: int | None
    ) -> AnswerCounts | None:
        """Counts of a plan's answers to a task, cached like its difference; None without per-example scores."""
        return None if n is None else self._against(native, plan, task, n)[1]

    def _against(
        self, native: pd.DataFrame | None, plan: Plan, task: str, n: int
    ) -> tuple[Score | None, AnswerCounts | None]:
        """Difference and counts together, since a file of answers takes longer to read than to compare."""
        cache_key = plan.key, task, n, 0 if native is None else len(native)
        if cache_key not in self._compared:
            rows = native if plan.is_native else self.examples(plan)
            if rows is None:
                self._compared[cache_key] = None, None
            else:
                base = None if native is None or plan.is_native else native[native["task"] == task]
                counts = count_answers(rows[rows["task"] == task], base)
                self._compared[cache_key] = difference(rows, native, task), counts
        return self._compared[cache_key]

    def counts_by_kind(self, plan: Plan) -> list[dict[str, object]]:
        """A plan's scores and counts of answers for each task and each kind of its questions."""
        rows, native = self.examples(plan), None if plan.is_native else self.examples(self.native)
        return [] if rows is None else list(counts_by_kind(rows, native))

    def compare(self, plan: Plan, base: Plan, task: str) -> Score | None:
        """The paired difference in a task's score between two plans; None without per-example scores."""
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        return difference(self.examples(plan), self.examples(base), task)

    @property
    def format(self) -> str | None:
        """The format in whose files sizes are counted; None: as plans themselves count them."""
        return files_of(self.runtime)

    def size(self, plan: Plan) -> Size:
        """The size of a plan, as those of all measured plans are counted."""
        return size_for(self.parts, plan, self.runtime)

    def plan(self, number: int) -> Plan:
        """The plan of a trial, by the trial's number."""
        check_is("number", number, Integral)
        for trial in self._trials.now():
            if trial.number == number:
                return trial.plan
        raise UserError(f"{self.path} has no trial {number}")

    def plan_named(self, wanted: str | int) -> Plan:
        """The one measured plan whose trial has this number, or whose key begins with this text."""
        wanted = str(wanted)
        trials = self.measurements()
        fitting = {trial.key: trial for trial in trials if trial.fits(wanted)}
        if len(fitting) != 1:
            what = f"several plans with the number or key '{wanted}'" if fitting else f"no measured plan '{wanted}'"
            every = f"`sensitivity table {shell_word(self.path)} --out plans.csv` lists all"
            listed = numbers_and_keys(list(fitting.values()) or trials)
            raise UserError(f"{self.path} has {what}; plans by number and key: {listed} ({every})")
        return next(iter(fitting.values())).plan

    def examples(self, plan: Plan) -> pd.DataFrame | None:
        """Per-example scores of a measured plan; None where only the means are known (an imported table).

        Damaged ones count as missing, with one warning; the next sweep runs the plan again.
        """
        check_is("plan", plan, Plan)
        return self._answers.of(plan)

    @property
    def native(self) -> Plan:
        """The plan that quantizes nothing."""
        return Plan.uniform(self.parts, None)
