"""Observations, the input of all analyses: each trial's bits per component and one task's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Plan
from sensitivity.study.counting import Floats, count, numbers
from sensitivity.study.records import mixed
from sensitivity.study.study import Study
from sensitivity.study.table import NATIVE


@dataclass(frozen=True)
class Observations:
    """One task's score of every usable trial; arrays run over trials, the second axis of `bits` over components."""

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

    def __len__(self) -> int:
        return len(self.score)

    def where(self, mask: Floats | Sequence[int]) -> Observations:
        """Only the trials of this mask, or of these indices."""
        rows = np.arange(len(self))[np.asarray(mask)]
        return replace(
            self,
            bits=self.bits[rows],
            score=self.score[rows],
            se=self.se[rows],
            bpw=self.bpw[rows],
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
    def noise(self) -> float | None:
        """Standard deviation of one score: from replicates of plans, else from the trials' standard errors."""
        groups = pd.DataFrame({"key": self.keys, "score": self.score}).groupby("key")["score"]
        spare = len(self.score) - groups.ngroups  # degrees of freedom
        if spare >= 3:
            return float(np.sqrt(((self.score - groups.transform("mean")) ** 2).sum() / spare))
        known = self.se[np.isfinite(self.se)]
        return float(np.sqrt(np.mean(known**2))) if len(known) else None


def check_task(study: Study, task: str | None) -> str:
    """The name of a task of this study; its first where none is given."""
    if task is None:
        return study.tasks[0]
    if task not in study.tasks:
        raise unknown("task", task, study.tasks)
    return task


def observations_of(study: Study, task: str | None = None, method: str | None = None) -> Observations:
    """The observations of one task, on request only those of plans that use one method, and of full precision."""
    task = check_task(study, task)
    measured = study.measured()
    if not measured:
        raise UserError(f"no trial of {study.path} has a score yet; let `sensitivity sweep` run on")
    trials = [trial.user_attrs for trial in measured]
    plans = [Plan.from_json(trial["plan"]) for trial in trials]
    methods = [_method(plan) for plan in plans]
    widths = [plan.bits(NATIVE) for plan in plans]
    scores = _level(study, task, plans, [trial["scores"].get(task) or {} for trial in trials])
    open_ = sum(trial.state != TrialState.COMPLETE for trial in measured)
    unfinished = (
        f"{open_:,} of {count(len(trials), 'trial')} have not seen all examples; those that saw fewer than full "
        "precision count by their difference to it; `sensitivity sweep` completes them"
    )
    readings = Observations(
        task,
        study.parts.names,
        np.array([[bits[name] for name in study.parts.names] for bits in widths], dtype=float),
        np.array([score.get("mean", np.nan) for score in scores], dtype=float),
        np.array([score.get("se", np.nan) for score in scores], dtype=float),
        tuple(trial["key"] for trial in trials),
        np.array([trial["size"]["bpw"] for trial in trials], dtype=float),
        tuple(methods),
        tuple(plans),
        tuple(note for note in (unfinished if open_ else None, mixed(measured)) if note),
    )
    if method is not None:
        found = sorted({m for m in methods if m != "native"})
        if method not in found:
            raise unknown("method of this study", method, found)
        readings = readings.where(np.array([m in (method, "native") for m in methods]))
    return _usable(readings)


def _level(study: Study, task: str, plans: Sequence[Plan], scores: list[dict[str, float]]) -> list[dict[str, float]]:
    """Scores of a sweep that was stopped early, made comparable.

    A trial that has seen fewer examples than full precision may have seen easier ones. So its score becomes that of
    full precision plus the paired difference on the examples that both have seen.
    """
    key = study.native.key
    full = next((score for plan, score in zip(plans, scores, strict=True) if plan.key == key), {})
    native, found = None, []
    for plan, score in zip(plans, scores, strict=True):
        if score.get("n", 0) < full.get("n", 0):
            native = study.examples(study.native) if native is None else native
            if apart := study.apart(native, plan, task, int(score["n"])):
                score = {**score, "mean": full["mean"] + apart.mean, "se": float(np.hypot(full["se"], apart.se))}
        found.append(score)
    return found


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
    bits = np.column_stack([numbers(table, column) for column in components])
    whole = np.isfinite(bits).all(axis=1)
    nothing = np.full(len(table), np.nan)
    keys = tuple("/".join(f"{b:g}" for b in row) for row in bits)
    readings = Observations(
        score,
        tuple(components),
        bits,
        numbers(table, score),
        numbers(table, se) if se else nothing,
        keys,
        numbers(table, bpw) if bpw else nothing,
        ("",) * len(table),
    )
    if (~whole).any():
        note = f"{count((~whole).sum(), 'trial')} left out: no bits given for some component"
        readings = replace(readings.where(whole), notes=(note,))
    return _usable(readings)


def _usable(readings: Observations) -> Observations:
    """The observations whose score is a finite number, with a note on the others."""
    finite = np.isfinite(readings.score)
    if not finite.any():
        raise UserError(f"no trial has a score for '{readings.task}'")
    if finite.all():
        return readings
    note = f"{count((~finite).sum(), 'trial')} left out: no number as score for '{readings.task}'"
    return replace(readings.where(finite), notes=(*readings.notes, note))


def _method(plan: Plan) -> str:
    """The methods of a plan, joined by +, or 'native'."""
    methods = {scheme.method for _, scheme in plan.schemes if scheme}
    return "native" if not methods else "+".join(sorted(methods))
