"""A study: an Optuna storage of trials plus per-example scores; the only door between the wings."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sensitivity.components import ComponentMap
from sensitivity.errors import UserError
from sensitivity.files import whole, write_whole
from sensitivity.plan import Plan, Size, size
from sensitivity.scores import Score, paired, summarise
from sensitivity.storage import KernelLock, held, open_storage

NATIVE = 16  # the 'bits' of a component at native precision, as an Optuna parameter and in tables
NAME = "sensitivity"
EXAMPLE_COLUMNS = ("task", "example", "cluster", "kind", "score", "nll", "answer")


@dataclass(frozen=True)
class Asked:
    """A trial that this process is to run, and its plan."""

    trial: optuna.Trial
    plan: Plan


class Study:
    """Trials of one model on the same tasks, examples and seeds, in a folder (and, for a team, a database)."""

    def __init__(self, path: Path | str, storage: str | None = None) -> None:
        self.path = Path(path)
        address = self.path / "storage.url"
        if storage is None and address.exists():
            storage = address.read_text().strip()
        if storage is None and not (self.path / "journal.log").exists():
            raise UserError(f"no study at {self.path}; `sensitivity sweep MODEL --out {self.path}` makes one")
        self._storage = open_storage(storage or self.path / "journal.log")
        try:
            self._optuna = optuna.load_study(study_name=NAME, storage=self._storage)
        except KeyError:
            raise UserError(f"{self.path} holds no study: it was never begun, or its first lines are lost") from None
        attrs = self._optuna.user_attrs
        if not {"meta", "tasks", "parts"} <= set(attrs):
            raise UserError(f"{self.path} was interrupted before its first trial; delete it and start again")
        self.meta: dict[str, Any] = attrs["meta"]
        self.tasks: tuple[str, ...] = tuple(attrs["tasks"])
        self.parts = ComponentMap.from_json(attrs["parts"])
        self._examples: dict[str, pd.DataFrame] = {}

    @classmethod
    def create(
        cls,
        path: Path | str,
        parts: ComponentMap,
        tasks: Sequence[str],
        meta: Mapping[str, Any],
        storage: str | None = None,
    ) -> Study:
        """Begin a study, or open the one that is there if it is about the same thing."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if storage is not None:
            write_whole(path / "storage.url", storage.encode())
        backend = open_storage(storage or path / "journal.log")
        # one maximised value per task, and bits per weight as the last, minimised one
        directions = [StudyDirection.MAXIMIZE] * len(tasks) + [StudyDirection.MINIMIZE]
        study = optuna.create_study(study_name=NAME, storage=backend, directions=directions, load_if_exists=True)
        wanted = {"meta": json.loads(json.dumps(dict(meta))), "tasks": list(tasks), "parts": parts.to_json()}
        wanted = json.loads(json.dumps(wanted))
        for name, value in wanted.items():
            found = study.user_attrs.get(name)
            if found is None:
                study.set_user_attr(name, value)
            elif found != value:
                raise UserError(f"{path} holds another study ({_difference(name, found, value)}); choose another --out")
        return cls(path, storage)

    # -- asking and telling ---------------------------------------------------------------------------------------

    @property
    def optuna_study(self) -> optuna.Study:
        return self._optuna

    def enqueue(self, plans: Iterable[Plan]) -> int:
        """Queue the plans that are not yet done, queued or running; return how many were added."""
        with held(KernelLock(self.path / "queue")):  # processes that start together want to queue the same plans
            return self._enqueue(plans)

    def _enqueue(self, plans: Iterable[Plan]) -> int:
        known = {t.user_attrs.get("key") for t in self._optuna.get_trials(deepcopy=False) if t.state != TrialState.FAIL}
        added = 0
        for plan in plans:
            if plan.key not in known:
                self._optuna.enqueue_trial(plan.bits(NATIVE), user_attrs={"key": plan.key, "plan": plan.to_json()})
                known.add(plan.key)
                added += 1
        return added

    def ask(self) -> Asked | None:
        """The next queued plan, now ours; None when the queue is empty."""
        while any(True for _ in self._optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,))):
            trial = self._optuna.ask(self.distributions)
            if "plan" not in trial.user_attrs:  # another process emptied the queue in between
                self._optuna.tell(trial, state=TrialState.FAIL)
                return None
            trial.set_user_attr("owner", _me())
            plan = Plan.from_json(trial.user_attrs["plan"])
            if not self._elsewhere(trial.number, plan.key):
                return Asked(trial, plan)
            self._optuna.tell(trial, state=TrialState.PRUNED)  # queued twice by two processes that started together
        return None

    def _elsewhere(self, number: int, key: str) -> bool:
        """Whether a plan is done, or was begun earlier by somebody who is still at it."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        found = [t for t in self._optuna.get_trials(deepcopy=False, states=states) if t.user_attrs.get("key") == key]
        return any(t.state == TrialState.COMPLETE or t.number < number for t in found)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(1, NATIVE) for name in self.parts.names}

    def tell(self, asked: Asked, examples: Mapping[str, Sequence[Any]], facts: Mapping[str, Any]) -> dict[str, float]:
        """Store a finished trial: first its examples, then, in one step that makes it count, its scores."""
        frame = pd.DataFrame(dict(examples), columns=list(EXAMPLE_COLUMNS))
        folder = self.path / "examples"
        folder.mkdir(exist_ok=True)
        target = folder / f"{asked.plan.key}.parquet"
        with whole(target) as unfinished:
            frame.to_parquet(unfinished, index=False)
        scores = {str(task): _score(rows) for task, rows in frame.groupby("task", sort=False)}
        weight = size(self.parts, asked.plan)
        for name, value in {"scores": scores, "size": weight.to_json(), **facts}.items():
            asked.trial.set_user_attr(name, value)
        means = {task: float(scores[task]["mean"]) for task in self.tasks}
        self._optuna.tell(asked.trial, [*means.values(), weight.bpw])
        return means

    def append(self, plans: Sequence[Plan], scores: Sequence[Mapping[str, float]]) -> None:
        """Add trials that were finished elsewhere, of which only the scores are known; replicates stay replicates."""
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
        """Mark a trial that could not be run, with the reason."""
        asked.trial.set_user_attr("failure", why)
        self._optuna.tell(asked.trial, state=TrialState.FAIL)

    def release_lost(self) -> int:
        """Queue again what processes that no longer live on this machine were running."""
        lost = [
            t
            for t in self._optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if not _alive(t.user_attrs.get("owner"))
        ]
        for trial in lost:
            self._optuna.tell(trial.number, state=TrialState.FAIL)
        plans = [Plan.from_json(t.user_attrs["plan"]) for t in lost if "plan" in t.user_attrs]
        return self.enqueue(plans)

    def compare(self, plan: Plan, base: Plan, task: str) -> Score | None:
        """The paired difference in a task's score between two finished plans; None without per-example scores."""
        ours, theirs = self.examples(plan), self.examples(base)
        if ours is None or theirs is None:
            return None
        both = ours[ours["task"] == task].merge(theirs[theirs["task"] == task], on="example", suffixes=("", "_base"))
        return paired(both["score"], both["score_base"], both["cluster"])

    # -- reading --------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Finished trials, in the order in which they were queued."""
        return self._optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def counts(self) -> dict[str, int]:
        """How many plans are done, waiting and running."""
        trials = self._optuna.get_trials(deepcopy=False)
        states = {"done": TrialState.COMPLETE, "waiting": TrialState.WAITING, "running": TrialState.RUNNING}
        return {name: sum(t.state == state for t in trials) for name, state in states.items()}

    def table(self) -> pd.DataFrame:
        """One row per finished trial: bits per component, size, and per task the score and its interval.

        Columns: number, key, plan (what a person calls it), uniform, native; a column of bits for each component;
        bytes, bpw, bpw_codes, seconds; for each task T: T, T.se, T.low, T.high, T.n, T.nll, and the paired
        difference to full precision as T.delta, T.delta.se, T.delta.low, T.delta.high.
        """
        return pd.DataFrame([self._row(trial) for trial in self.trials()])

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        attrs = trial.user_attrs
        plan = Plan.from_json(attrs["plan"])
        row: dict[str, Any] = {
            "number": trial.number,
            "key": attrs["key"],
            "plan": plan.describe(),
            "uniform": plan.is_uniform,
            "native": plan.is_native,
            **plan.bits(NATIVE),
            **attrs["size"],
            "seconds": attrs.get("seconds", np.nan),
        }
        for task in self.tasks:
            score = attrs["scores"].get(task)
            if score is None:
                continue
            row |= {task: score["mean"], f"{task}.nll": score.get("nll")}
            row |= {f"{task}.{name}": score.get(name) for name in ("se", "low", "high", "n")}
            if delta := self.compare(plan, self.native, task):
                row |= {f"{task}.delta": delta.mean, f"{task}.delta.se": delta.se}
                row |= {f"{task}.delta.low": delta.low, f"{task}.delta.high": delta.high}
        return row

    def plan(self, number: int) -> Plan:
        return Plan.from_json(self._optuna.get_trials(deepcopy=False)[number].user_attrs["plan"])

    def examples(self, plan: Plan) -> pd.DataFrame | None:
        """Per-example scores of a finished plan; None where only the means are known (an imported table)."""
        if plan.key not in self._examples:
            path = self.path / "examples" / f"{plan.key}.parquet"
            if not path.exists():
                return None
            self._examples[plan.key] = pd.read_parquet(path)
        return self._examples[plan.key]

    @property
    def native(self) -> Plan:
        """The plan that quantises nothing."""
        return Plan.uniform(self.parts, None)


def _score(rows: pd.DataFrame) -> dict[str, Any]:
    known = rows["nll"].dropna()
    return {**summarise(rows["score"], rows["cluster"]).to_json(), "nll": float(known.mean()) if len(known) else None}


def _difference(name: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*found, *wanted]:
            if found.get(key) != wanted.get(key):
                return _difference(key, found.get(key), wanted.get(key))
    short = [text if len(text := str(value)) < 60 else text[:57] + "..." for value in (found, wanted)]
    return f"{name}: there {short[0]}, here {short[1]}"


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's own count, so that a reused pid is not mistaken for the old process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _alive(owner: Mapping[str, Any] | None) -> bool:
    """Whether the owner of a trial may still be at work; on another machine we cannot know and assume so."""
    if owner is None:
        return False
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_started(owner["pid"]) == owner["since"])


__all__ = ["EXAMPLE_COLUMNS", "NATIVE", "Asked", "Score", "Size", "Study", "write_whole"]
