"""Checks what is read from a study's storage: the study's own attributes, and each trial once per state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sensitivity.spec import schema
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan

AGAIN = "again"  # user attribute of a study: numbers of trials whose answers were lost and whose plans are run again
MEND = "restore a copy of the study, or sweep into another --out"


def identity(attrs: Mapping[str, Any], directions: Sequence[StudyDirection], path: Path) -> ComponentMap:
    """The components of a study, after all its attributes were checked."""
    schema.check(attrs, "study", f"the study at {path} is damaged", MEND)
    if len(directions) != len(attrs["tasks"]) + 1:
        raise UserError(f"the study at {path} is damaged: it has {len(directions) - 1} scores for other tasks; {MEND}")
    parts = ComponentMap.from_json(attrs["parts"])
    try:
        names = [name for name in parts.names if not name]
        twice = len(parts.weights) - len({weight.name for weight in parts.weights})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the study at {path} is damaged: its weights are in no component; {MEND}") from error
    if names or twice:
        raise UserError(f"the study at {path} is damaged: its weights have no names of their own; {MEND}")
    return parts


def has_answers(trial: FrozenTrial, tasks: Sequence[str]) -> bool:
    """Whether a trial has per-example answers; an imported one has mean scores alone."""
    return any("n" in trial.user_attrs["scores"][task] for task in tasks)


def mixed(trials: Iterable[FrozenTrial], ours: Mapping[str, str] | None = None) -> str | None:
    """A sentence on the software versions by which trials were measured, where they, or ours, differ; else None."""
    found: dict[str, set[str]] = {}
    known = [dict(trial.user_attrs.get("versions", {})) for trial in trials]
    for versions in [*known, *([dict(ours)] if ours and any(known) else [])]:
        for name in set(versions) - {"threads"}:
            found.setdefault(name, set()).add(versions[name])
    several = [
        f"{name} {' and '.join(sorted(versions))}" for name, versions in sorted(found.items()) if len(versions) > 1
    ]
    if not several:
        return None
    return (
        f"plans of this study were measured by different versions ({'; '.join(several)}), which may score differently"
    )


class Records:
    """Checks trials as they come from the storage, each once per state, since all are read again and again."""

    def __init__(self, path: Path, tasks: Sequence[str], names: Sequence[str]) -> None:
        self.path, self.tasks, self.names = path, tasks, set(names)
        self._seen: dict[int, object] = {}

    def checked(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The same trials, or an error that says which of them is damaged."""
        for trial in trials:
            # attributes are added while a trial runs, and `done` grows when it is queued for further examples
            state = trial.state, trial.user_attrs.get("done"), len(trial.user_attrs)
            if self._seen.get(trial.number) != state:
                self._check(trial)
                self._seen[trial.number] = state
        return trials

    def _check(self, trial: FrozenTrial) -> None:
        attrs, what = trial.user_attrs, f"trial {trial.number} of the study at {self.path} is damaged"
        scored = trial.state == TrialState.COMPLETE or "scores" in attrs
        if not scored and "plan" not in attrs:
            return  # queued by Optuna's own tools and not yet finished: nobody reads it
        schema.check(attrs, "trial", what, MEND)
        plan = Plan.from_json(attrs["plan"])
        if set(attrs["plan"]) != self.names:
            raise UserError(f"{what}: its plan is for other components than the study's; {MEND}")
        if not scored:
            return
        lacking = [name for name in ("scores", "size") if name not in attrs]
        lacking += [f"scores.{task}" for task in self.tasks if not lacking and task not in attrs["scores"]]
        if lacking:
            raise UserError(f"{what}: '{lacking[0]}' is missing; {MEND}")
        if plan.key != attrs["key"]:
            raise UserError(f"{what}: its plan is not the one that its key names; {MEND}")
