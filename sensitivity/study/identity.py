"""What a study is about: its model, data, tasks and components, stored once and compared whenever a sweep continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from sensitivity.spec import schema
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.study.counting import count
from sensitivity.study.storage import paths
from sensitivity.study.storage.process_lock import ProcessLock, held
from sensitivity.study.trial import REPAIR

NAME = "sensitivity"  # of the study in Optuna's storage
RUNTIME = "runtime"  # attribute of a study: the runtime that its plans are for, whose files their sizes count
LATER = ("unread", "other_bits")  # fields of components that earlier versions did not store
DISCARDED = "again"  # attribute of a study: numbers of trials whose answers were lost and whose plans are run again


class NotBegun(UserError):
    """A study that was interrupted before its first trial; a sweep into the same folder goes on from there."""


class Meta(TypedDict, total=False):
    """What all trials of a study share; the fields from `imported` on are those of an imported table."""

    model: str
    fingerprint: str
    dtype: str
    note: str | None
    tasks: list[str]  # as typed by the user
    n: int
    seed: int
    whole_answers: bool
    data: dict[str, str]  # task -> how many examples, and their fingerprint
    chance: dict[str, float | None]
    imported: str
    rows: int
    used: int
    left_out: list[str]
    columns: dict[str, str]


@dataclass(frozen=True)
class Identity:
    """What a study is about."""

    meta: Meta
    tasks: tuple[str, ...]
    parts: ComponentMap
    runtime: str | None = None  # whose files sizes count; None: the bits that plans themselves count


def store_or_compare(
    path: Path,
    parts: ComponentMap,
    tasks: Sequence[str],
    meta: Mapping[str, object],
    storage: BaseStorage,
    runtime: str | None = None,
) -> None:
    """Store what a new study is about; for an existing one, raise an error unless it is about the same.

    Only the runtime may change, since nothing that was measured depends on it; None leaves an earlier one.
    """
    # one maximized value per task, and bits per weight as the last, minimized one
    directions = [StudyDirection.MAXIMIZE] * len(tasks) + [StudyDirection.MINIMIZE]
    wanted = json.loads(json.dumps({"meta": dict(meta), "tasks": list(tasks), "parts": parts.to_json()}))
    # under a lock: else processes that start together all find nothing stored, and each stores its own
    with held(ProcessLock(path / paths.QUEUE_LOCK)):
        study = optuna.create_study(study_name=NAME, storage=storage, directions=directions, load_if_exists=True)
        for name, value in wanted.items():
            stored = study.user_attrs.get(name)
            if stored is None:
                study.set_user_attr(name, value)
            elif stored != value and stored != _as_before(value, stored):
                raise another_study(path, _first_difference(name, stored, value))
        if runtime not in (None, study.user_attrs.get(RUNTIME)):
            study.set_user_attr(RUNTIME, runtime)


def _as_before(value: object, stored: object) -> object:
    """What versions stored that did not know of parameters that a model never reads, or of several widths."""
    if not (isinstance(value, dict) and isinstance(stored, dict)):
        return value
    return {name: one for name, one in value.items() if name not in LATER or name in stored}


def another_study(path: Path, why: str) -> UserError:
    """The error for a folder that holds a study of something else."""
    hint = ""
    if why.startswith("n: ") and paths.expected_file(path).exists():  # n may not be what was typed
        hint = "; `sensitivity plan` searches on fewer examples than its --n, where that is above 100"
    return UserError(f"{path} holds another study ({why}{hint}); choose another --out")


def load(path: Path, storage: BaseStorage) -> tuple[optuna.Study, Identity]:
    """The Optuna study in a storage, and what it is about."""
    try:
        study = optuna.load_study(study_name=NAME, storage=storage)
    except KeyError:
        raise UserError(f"{path} holds no study: it was never begun, or its first lines are lost") from None
    attrs = study.user_attrs
    if not {"meta", "tasks", "parts"} <= set(attrs):
        raise NotBegun(f"{path} was interrupted before its first trial; run the sweep again to go on")
    schema.check(attrs, "study", f"the study at {path} is damaged", REPAIR)
    if len(study.directions) != len(attrs["tasks"]) + 1:
        scores, tasks = count(len(study.directions) - 1, "score"), count(len(attrs["tasks"]), "task")
        raise UserError(f"the study at {path} is damaged: its trials have {scores}, and it names {tasks}; {REPAIR}")
    parts = ComponentMap.from_json(attrs["parts"])
    try:
        nameless = [name for name in parts.names if not name]
        repeated = len(parts.weights) - len({weight.name for weight in parts.weights})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the study at {path} is damaged: its weights are in no component; {REPAIR}") from error
    if nameless or repeated:
        raise UserError(f"the study at {path} is damaged: its weights have no names of their own; {REPAIR}")
    return study, Identity(attrs["meta"], tuple(attrs["tasks"]), parts, attrs.get(RUNTIME))


def copy(study: optuna.Study, storage: BaseStorage) -> None:
    """Copy all trials and what the study is about, without the folders of this machine, so that it can be shared."""
    copied = optuna.create_study(study_name=NAME, storage=storage, directions=study.directions)
    for name, value in study.user_attrs.items():
        copied.set_user_attr(name, _without_folders(value) if name in ("meta", "parts") else value)
    copied.add_trials(study.get_trials(deepcopy=False))


def _without_folders(attribute: Mapping[str, object]) -> dict[str, object]:
    """An attribute whose model and tasks, where it has them, are named without the folders of this machine."""
    portable, tasks = dict(attribute), attribute.get("tasks")
    if "model" in attribute:
        portable["model"] = without_folder(str(attribute["model"]))
    if isinstance(tasks, list):
        portable["tasks"] = [without_folder(str(task)) for task in tasks]
    return portable


def without_folder(source: str) -> str:
    """A model or a task without its folder; a hub name or an embedded model stays as it is."""
    head, colon, path = source.rpartition(":")
    return f"{head}{colon}{Path(path).name}" if Path(path).is_absolute() else source


def discarded(study: optuna.Study) -> frozenset[int]:
    """The numbers of trials whose answers were lost, and which no longer count."""
    return frozenset(study.user_attrs.get(DISCARDED, ()))


def discard(study: optuna.Study, numbers: Iterable[int]) -> None:
    """Store which trials no longer count: Optuna cannot change a finished trial, so the study lists them."""
    study.set_user_attr(DISCARDED, sorted(numbers))


def _first_difference(name: str, stored: object, wanted: object) -> str:
    """Where two JSON values first differ, for an error message."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in [*stored, *wanted]:
            if stored.get(key) != wanted.get(key):
                return _first_difference(key, stored.get(key), wanted.get(key))
    short = [text if len(text := str(value)) < 60 else text[:57] + "..." for value in (stored, wanted)]
    return f"{name}: there {short[0]}, here {short[1]}"
