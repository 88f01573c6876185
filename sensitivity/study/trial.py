"""Trial: what is stored of one plan's evaluation; the only code that reads and writes attributes of Optuna's trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TypedDict

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from sensitivity.spec import schema
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEY_LENGTH, Plan
from sensitivity.spec.runtimes.rules import size_for
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import SizeJson
from sensitivity.study.owner import Owner
from sensitivity.study.scores import TaskScore, mean_of_repetitions

NATIVE = 16  # the 'bits' of a component at native precision, as an Optuna parameter and in tables
REPAIR = "restore a copy of the study, or sweep into another --out"  # the end of messages about a damaged study
MAX_NAMED = 6  # most plans that a message names
ABANDONED = (TrialState.FAIL, TrialState.PRUNED)  # pruned: queued twice; failed: given up, or its answers were lost


class RunFacts(TypedDict, total=False):
    """How a trial ran: what is stored beside its scores."""

    seconds: float
    images: int
    path: str
    versions: Mapping[str, str]
    not_finite: int
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """One plan, its tasks' scores with intervals, its size, timings, versions and state.

    What all trials of a study share (model, data, seed) is in `Study.meta`. The fields from `owner` on are stored as
    user attributes of Optuna's trial under the same names, in this order. `scores` come near the end: other processes
    read a trial as soon as it has scores, and rely on all that was written before.
    """

    plan: Plan
    key: str
    number: int = -1  # -1: not stored yet
    id: int = -1  # by which Optuna's storage knows the trial
    state: TrialState = TrialState.WAITING
    values: tuple[float, ...] = ()  # the mean score of each task, then bits per weight; empty until it is complete
    time: datetime | None = None  # when it was completed, or else begun
    owner: Owner | None = None  # the process that runs it, or ran it last
    size: SizeJson | None = None
    seconds: float | None = None
    images: int | None = None  # how many the trial has seen, stored when it is complete
    path: str | None = None  # "fast", or "plain": without sharing work between plans
    versions: Mapping[str, str] = field(default_factory=dict)
    not_finite: int = 0  # examples that scored 0 because their logits were NaN or infinite
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # task -> metric -> value
    failure: str | None = None
    scores: Mapping[str, TaskScore] = field(default_factory=dict)  # by task
    done: int = 0  # how many clusters (images) of the examples it has seen, until it is complete

    @classmethod
    def of(cls, plan: Plan) -> Trial:
        """A trial of a plan that is not stored yet."""
        return cls(plan, plan.key)

    @property
    def bpw(self) -> float:
        """Bits per weight of a trial that has scores."""
        assert self.size is not None
        return self.size["bpw"]

    @property
    def is_open(self) -> bool:
        """Whether the trial waits or runs."""
        return self.state in (TrialState.WAITING, TrialState.RUNNING)

    def fits(self, wanted: str) -> bool:
        """Whether a user's text is the trial's number, or the beginning of its plan's key.

        Up to three digits are a number alone, since in any study of some size they begin another plan's key, too.
        """
        is_key = len(wanted) > 3 or (wanted != "" and not wanted.isdecimal())
        return wanted == str(self.number) or (is_key and self.key.startswith(wanted))

    @property
    def has_answers(self) -> bool:
        """Whether per-example answers were stored; an imported trial has mean scores alone."""
        return any("n" in score for score in self.scores.values())


# the fields that are stored as user attributes
STORED = tuple(Trial.__dataclass_fields__)[list(Trial.__dataclass_fields__).index("owner") :]


def _from_optuna(frozen: FrozenTrial) -> Trial:
    """The trial that Optuna's trial holds; its attributes were checked."""
    attrs = frozen.user_attrs
    return Trial(
        Plan.from_json(attrs["plan"]),
        attrs["key"],
        frozen.number,
        frozen._trial_id,
        frozen.state,
        tuple(frozen.values or ()),
        frozen.datetime_complete or frozen.datetime_start,
        **{name: attrs[name] for name in STORED if name in attrs},
    )


def _changes(before: Trial, after: Trial) -> dict[str, object]:
    """The attributes in which two states of a trial differ, in the order in which they are written."""
    return {name: value for name in STORED if (value := getattr(after, name)) != getattr(before, name)}


def write(storage: BaseStorage, before: Trial, after: Trial) -> None:
    """Store what has changed in a trial, apart from its state."""
    for name, value in _changes(before, after).items():
        storage.set_trial_user_attr(before.id, name, value)


def enqueue(study: optuna.Study, trial: Trial) -> None:
    """Store a new trial that waits to be run."""
    study.enqueue_trial(trial.plan.bits(NATIVE), user_attrs=_attributes(trial))


def finished(trial: Trial, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """A trial that was measured elsewhere, as Optuna's finished trial."""
    return optuna.trial.create_trial(
        values=list(trial.values),
        params=trial.plan.bits(NATIVE),
        distributions=dict(distributions),
        user_attrs=_attributes(trial),
    )


def _attributes(trial: Trial) -> dict[str, object]:
    return {"key": trial.key, "plan": trial.plan.to_json(), **_changes(Trial.of(trial.plan), trial)}


def one_per_plan(trials: Iterable[Trial]) -> list[Trial]:
    """One trial for each plan, the first: where an imported table repeats a plan, with the means of its scores."""
    by_key: dict[str, list[Trial]] = {}
    for trial in trials:
        by_key.setdefault(trial.key, []).append(trial)
    return [first if not others else _averaged(first, others) for first, *others in by_key.values()]


def _averaged(first: Trial, others: Sequence[Trial]) -> Trial:
    """The first of several trials of one plan, with the mean scores of all."""
    every = [first, *others]
    means = {task: mean_of_repetitions([trial.scores[task] for trial in every]) for task in first.scores}
    return replace(first, scores=means)


def numbers_and_keys(trials: Iterable[Trial]) -> str:
    """Plans by number and key, for a message: the first ones, and how many more there are."""
    plans = {trial.key: trial.number for trial in trials}
    named = ", ".join(f"{number} {key[:KEY_LENGTH]}" for key, number in list(plans.items())[:MAX_NAMED])
    return named + (f" and {len(plans) - MAX_NAMED} more" if len(plans) > MAX_NAMED else "")


class TrialReader:
    """Reads and checks the trials of a study, each only when it has changed, since all are read again and again.

    Sizes are counted in the files of `runtime`, also for trials that were stored before the study had this runtime.
    """

    def __init__(self, study: Path, tasks: Sequence[str], parts: ComponentMap, runtime: str | None = None) -> None:
        self.study, self.tasks, self.parts, self.runtime = study, tasks, parts, runtime
        self._read: dict[int, tuple[object, Trial | None]] = {}

    def read_all(self, trials: Iterable[FrozenTrial]) -> list[Trial]:
        """All trials but those that Optuna's own tools queued, or an error that says which of them is damaged."""
        return [trial for frozen in trials if (trial := self.read(frozen)) is not None]

    def read(self, frozen: FrozenTrial) -> Trial | None:
        """One trial; None where Optuna's own tools queued it: it has no plan, and is never run."""
        attrs = frozen.user_attrs
        # attributes are added while a trial runs; `done` and `seconds` grow when it is queued for further examples; and
        # the owner changes when the trial's process died and another one has claimed it since
        state = frozen.state, attrs.get("owner"), attrs.get("done"), attrs.get("seconds"), len(attrs)
        if frozen.number not in self._read or self._read[frozen.number][0] != state:
            self._read[frozen.number] = state, self._checked(frozen)
        return self._read[frozen.number][1]

    def _checked(self, frozen: FrozenTrial) -> Trial | None:
        attrs, what = frozen.user_attrs, f"trial {frozen.number} of the study at {self.study} is damaged"
        scored = frozen.state == TrialState.COMPLETE or "scores" in attrs
        if not scored and "plan" not in attrs:
            return None
        schema.check(attrs, "trial", what, REPAIR)
        trial = _from_optuna(frozen)
        if set(attrs["plan"]) != set(self.parts.names):
            raise UserError(f"{what}: its plan is for other components than the study's; {REPAIR}")
        if not scored:
            return trial
        missing = [name for name in ("scores", "size") if name not in attrs]
        missing += [f"scores.{task}" for task in self.tasks if not missing and task not in trial.scores]
        if missing:
            raise UserError(f"{what}: '{missing[0]}' is missing; {REPAIR}")
        if trial.plan.key != trial.key:
            raise UserError(f"{what}: its plan is not the one that its key names; {REPAIR}")
        if trial.size is not None and trial.size.get("format") != files_of(self.runtime):
            return replace(trial, size=size_for(self.parts, trial.plan, self.runtime).to_json())
        return trial


def mixed_versions(trials: Iterable[Trial], ours: Mapping[str, str] | None = None) -> str | None:
    """A sentence on the software versions that measured trials, if they differ from each other or from ours."""
    by_library: dict[str, set[str]] = {}
    recorded = [trial.versions for trial in trials]
    for versions in [*recorded, *([ours] if ours and any(recorded) else [])]:
        for name in set(versions) - {"threads"}:
            by_library.setdefault(name, set()).add(versions[name])
    several = [f"{name} {' and '.join(sorted(each))}" for name, each in sorted(by_library.items()) if len(each) > 1]
    if not several:
        return None
    return (
        f"plans of this study were measured by different versions ({'; '.join(several)}), which may score differently"
    )
