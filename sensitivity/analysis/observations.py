"""Observations, the input of all analyses: each trial's bits per component and one task's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from sensitivity.analysis.likelihood import Link, link
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import ACTIVATIONS, CACHE, Plan
from sensitivity.study.counting import Floats, count, numbers_of
from sensitivity.study.scores import TaskScore
from sensitivity.study.study import Study
from sensitivity.study.trial import NATIVE, Trial, mixed_versions

MIN_REPLICATES = 3  # noise is estimated from replicates of plans if there are at least so many
MIN_NOISE_SHARE = 0.25  # least noise of one score, as a share of the mean noise of all scores
# of a score's error, what differs from plan to plan; the rest is due to the examples, which all plans share (its
# square was .22 to .62 on the embedded models, .30 in the middle)
OWN = 0.55
ROUNDED_COLUMNS = (ACTIVATIONS, CACHE)  # endings of the names of a component's further columns


@dataclass(frozen=True)
class Observations:
    """One task's score of every usable trial; arrays run over trials, the second axis of `bits` over components.

    Where plans round a component's activations or its cache, their bits are further columns, named after it.
    """

    task: str
    names: tuple[str, ...]
    bits: Floats
    score: Floats
    se: Floats  # standard errors; NaN where unknown
    keys: tuple[str, ...]  # equal keys are replicates of one plan
    bpw: Floats  # NaN where sizes are unknown
    methods: tuple[str, ...]
    plans: tuple[Plan, ...] = ()
    notes: tuple[str, ...] = ()  # which trials were left out and why, as sentences
    nll: Floats | None = None  # mean negative log-likelihoods of right answers; NaN where unknown

    def __len__(self) -> int:
        return len(self.score)

    def where(self, mask: Floats | Sequence[int]) -> Observations:
        """Only the trials that a mask selects, or those with these indices."""
        rows = np.arange(len(self))[np.asarray(mask)]
        return replace(
            self,
            bits=self.bits[rows],
            score=self.score[rows],
            se=self.se[rows],
            bpw=self.bpw[rows],
            nll=None if self.nll is None else self.nll[rows],
            keys=tuple(self.keys[i] for i in rows),
            methods=tuple(self.methods[i] for i in rows),
            plans=tuple(self.plans[i] for i in rows) if self.plans else (),
        )

    def without(self, names: Sequence[str]) -> Observations:
        """All trials, without the bits of these components."""
        keep = [i for i, name in enumerate(self.names) if name not in names]
        return replace(self, bits=self.bits[:, keep], names=tuple(self.names[i] for i in keep))

    @cached_property
    def full(self) -> float:
        """The score at full precision: its mean where measured, else the mean of the trials with the most bits."""
        native = np.all(self.bits == 16, axis=1)
        if native.any():
            return float(self.score[native].mean())
        widest = self.bits.sum(axis=1)
        return float(self.score[widest == widest.max()].mean())

    @cached_property
    def link(self) -> Link | None:
        """How scores follow from likelihoods, if the plans show it."""
        if self.nll is None or self.noises is None:
            return None
        return link(self.score, self.nll, OWN * self.noises, self.full)

    @cached_property
    def steadied(self) -> Floats:
        """The scores, read with the likelihoods of right answers where there are such."""
        if self.link is None or self.nll is None or self.noises is None:
            return self.score
        return self.link.steadied(self.score, self.nll, OWN * self.noises)

    @cached_property
    def noise(self) -> float | None:
        """Standard deviation of one score: from replicates of plans, else from the trials' standard errors."""
        groups = pd.DataFrame({"key": self.keys, "score": self.score}).groupby("key")["score"]
        spare = len(self.score) - groups.ngroups  # degrees of freedom
        if spare >= MIN_REPLICATES:
            return float(np.sqrt(((self.score - groups.transform("mean")) ** 2).sum() / spare))
        known = self.se[np.isfinite(self.se)]
        return float(np.sqrt(np.mean(known**2))) if len(known) else None

    @cached_property
    def noises(self) -> Floats | None:
        """Standard deviation of each score, from replicates or its own standard error; None where neither is known."""
        if self.noise is None:
            return None
        if len(self.score) - len(set(self.keys)) >= MIN_REPLICATES:
            return np.full(len(self), self.noise)
        # the standard error is 0 if all answers are right or all are wrong, yet such a score is noisy, too
        return np.maximum(np.where(np.isfinite(self.se), self.se, self.noise), MIN_NOISE_SHARE * self.noise)


def check_task(study: Study, task: str | None) -> str:
    """The name of a task of this study; its first where none is given."""
    if task is None:
        return study.tasks[0]
    if task not in study.tasks:
        raise unknown("task", task, study.tasks)
    return task


def observations_of(study: Study, task: str | None = None, method: str | None = None) -> Observations:
    """The observations of one task; with `method`, only those of plans that use it alone, and of full precision."""
    task = check_task(study, task)
    trials = study.measurements()
    if not trials:
        raise UserError(f"no trial of {study.path} has a score yet; let `sensitivity sweep` run on")
    methods = [_method(trial.plan) for trial in trials]
    seen = {name for trial in trials for name in trial.plan.rounded_bits()}
    rounded = [name for part in study.parts.names for kind in ROUNDED_COLUMNS if (name := f"{part}.{kind}") in seen]
    names = (*study.parts.names, *rounded)
    widths = [dict.fromkeys(rounded, NATIVE) | t.plan.bits(NATIVE) | t.plan.rounded_bits() for t in trials]
    scores = _comparable(study, task, trials)
    incomplete = sum(trial.state != TrialState.COMPLETE for trial in trials)
    unfinished = (
        f"{incomplete:,} of {count(len(trials), 'trial')} have not seen all examples; those that saw fewer than full "
        "precision count by their difference to it; `sensitivity sweep` completes them"
    )
    observations = Observations(
        task,
        names,
        np.array([[bits[name] for name in names] for bits in widths], dtype=float),
        np.array([np.nan if score is None else score["mean"] for score in scores], dtype=float),
        np.array([np.nan if score is None else score.get("se", np.nan) for score in scores], dtype=float),
        tuple(trial.key for trial in trials),
        np.array([trial.bpw for trial in trials], dtype=float),
        tuple(methods),
        tuple(trial.plan for trial in trials),
        tuple(note for note in (unfinished if incomplete else None, mixed_versions(trials)) if note),
        np.array([_nll(score) for score in scores]),
    )
    if method is not None:
        present = sorted({m for m in methods if m != "native"})
        if method not in present:
            raise unknown("method of this study", method, present)
        observations = observations.where(np.array([m in (method, "native") for m in methods]))
    return _with_score(observations)


def _nll(score: TaskScore | None) -> float:
    """A trial's mean negative log-likelihood; NaN where it has none for the examples of its score."""
    found = None if score is None else score.get("nll")
    return np.nan if found is None else found


def _comparable(study: Study, task: str, trials: Sequence[Trial]) -> list[TaskScore | None]:
    """A task's score of each trial; those of a sweep that was stopped early are made comparable.

    A trial that has seen fewer examples than full precision may have seen easier ones. So its score becomes that of
    full precision plus the paired difference on the examples that both have seen.
    """
    key = study.native.key
    full = next((trial.scores.get(task) for trial in trials if trial.key == key), None)
    native: pd.DataFrame | None = None
    scores: list[TaskScore | None] = []
    for trial in trials:
        score = trial.scores.get(task)
        if score is not None and full is not None and score.get("n", 0) < full.get("n", 0):
            native = study.examples(study.native) if native is None else native
            if difference := study.difference_to_native(native, trial.plan, task, score["n"]):
                se = float(np.hypot(np.inf if full["se"] is None else full["se"], difference.se))
                score = {**score, "mean": full["mean"] + difference.mean, "se": se, "nll": None}
        scores.append(score)
    return scores


def observations_of_table(
    table: pd.DataFrame, components: Sequence[str], score: str, se: str | None = None, bpw: str | None = None
) -> Observations:
    """Observations from any table with a column of bits for each component and a column of scores."""
    if not table.columns.is_unique:
        twice = sorted({str(c) for c in table.columns[table.columns.duplicated()]})
        raise UserError(f"the table has two columns named '{twice[0]}'; rename or delete one")
    for column in (*components, score):
        if column not in table:
            raise unknown("column", column, table.columns)
    bits = np.column_stack([numbers_of(table, column) for column in components])
    whole = np.isfinite(bits).all(axis=1)
    unknown_values = np.full(len(table), np.nan)
    keys = tuple("/".join(f"{b:g}" for b in row) for row in bits)
    observations = Observations(
        score,
        tuple(components),
        bits,
        numbers_of(table, score),
        numbers_of(table, se) if se else unknown_values,
        keys,
        numbers_of(table, bpw) if bpw else unknown_values,
        ("",) * len(table),
    )
    if (~whole).any():
        note = f"{count((~whole).sum(), 'trial')} left out: no bits given for some component"
        observations = replace(observations.where(whole), notes=(note,))
    return _with_score(observations)


def _with_score(observations: Observations) -> Observations:
    """The observations whose score is a finite number, with a note on those left out."""
    finite = np.isfinite(observations.score)
    if not finite.any():
        raise UserError(f"no trial has a score for '{observations.task}'")
    if finite.all():
        return observations
    note = f"{count((~finite).sum(), 'trial')} left out: no number as score for '{observations.task}'"
    return replace(observations.where(finite), notes=(*observations.notes, note))


def _method(plan: Plan) -> str:
    """The methods of a plan, joined by +, or 'native'."""
    methods = {scheme.method for _, scheme in plan.schemes if scheme}
    return "native" if not methods else "+".join(sorted(methods))
