"""Rankings kept in a study's folder by what they depend on, trials, wishes and this code; safe to delete."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sensitivity.files import write_whole
from sensitivity.trials import Study

CODE = ("readings", "estimators", "treeshap", "importance", "robustness")  # a change in these is another ranking


def place(study: Study, wish: Mapping[str, Any]) -> Path:
    """The file of a ranking: its name is the hash of all that it depends on."""
    trials = [(trial.user_attrs["key"], trial.user_attrs["scores"]) for trial in study.measured()]
    content = json.dumps([_code(), dict(wish), study.parts.to_json(), trials], sort_keys=True, default=str)
    return study.path / "rankings" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"


def read(path: Path) -> dict[str, Any] | None:
    """What was kept; None where nothing was, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    return None


def write(path: Path, ranking: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a folder that may only be read is no reason to fail
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(dict(ranking)).encode())


@cache
def _code() -> str:
    files = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in CODE]
    return hashlib.sha256(b"".join(files)).hexdigest()
