"""Finds the YAML file of an lmms-eval task by its name, without the seconds that importing lmms-eval takes."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sensitivity.spec.errors import UserError

INSTALL = "pip install --no-deps lmms-eval==0.7.3 && pip install 'vlm-sensitivity[lmms]'"
_NAME = re.compile(rb"""^(task|group) *: *["']?([\w.@+-]+)["']? *(?:#.*)?\r?$""", re.MULTILINE)
_MEMBERS = re.compile(rb"""^task *: *\r?\n((?: *- .*\r?\n?|\s*#.*\r?\n?|\s*\r?\n)+)""", re.MULTILINE)
_MEMBER = re.compile(rb"""^ *- *["']?([\w.@+-]+)["']? *(?:#.*)?\r?$""", re.MULTILINE)
SHOWN = 12  # tasks of a group that a message lists


@dataclass(frozen=True)
class TaskFiles:
    """The YAML file of every task, and the tasks of every group."""

    files: dict[str, Path]
    groups: dict[str, tuple[str, ...]]


def installed() -> Path:
    """The folder of lmms-eval, or an error that says how to install it."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"tasks of lmms-eval need the extra lmms; type {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def find_task_files(package: Path) -> TaskFiles:
    """All tasks and groups in lmms-eval's folder, found without parsing 2,000 files as YAML as the library does."""
    files: dict[str, Path] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for folder, _, names in os.walk(package / "tasks"):
        for name in sorted(names):
            if name.endswith(".yaml"):
                content = (path := Path(folder, name)).read_bytes()
                keys = {key.decode(): value.decode() for key, value in _NAME.findall(content)}
                if "task" in keys:
                    files[keys["task"]] = path
                elif "group" in keys and (members := _MEMBERS.search(content)):
                    groups[keys["group"]] = tuple(one.decode() for one in _MEMBER.findall(members[1]))
    return TaskFiles(files, groups)


def file_of(name: str) -> Path:
    """The YAML file of a task; if the name is that of a group, the error names its tasks."""
    known = find_task_files(installed())
    if name in known.files:
        return known.files[name]
    if members := known.groups.get(name):
        listed = ",".join(members[:SHOWN]) + (", ..." if len(members) > SHOWN else "")
        raise UserError(f"lmms-eval:{name} is a group of tasks; name those that you want: lmms-eval:{listed}")
    near = difflib.get_close_matches(name, [*known.files, *known.groups], n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UserError(f"lmms-eval has no task '{name}' among its {len(known.files):,}{hint}")
