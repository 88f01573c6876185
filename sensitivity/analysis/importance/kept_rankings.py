"""A cache of rankings in the study's folder, keyed by trials, arguments and code; safe to delete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sensitivity.spec.errors import UserError
from sensitivity.spec.files import PACKAGE, write_atomically
from sensitivity.study.study import Study

LIBRARIES = ("numpy", "scipy", "pandas", "scikit-learn", "shap", "optuna")  # whose versions are part of the key


def place(study: Study, wish: Mapping[str, Any]) -> Path:
    """The file of a ranking, whose name is a hash of all that it depends on: trials, arguments and code."""
    kept = ("key", "plan", "size", "scores", "versions")
    trials = [[trial.state.name, *map(trial.user_attrs.get, kept)] for trial in study.measured()]
    content = json.dumps([_code(), dict(wish), study.parts.to_json(), trials], sort_keys=True, default=str)
    return study.path / "rankings" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"


def read(path: Path) -> dict[str, Any] | None:
    """The cached ranking as JSON; None where there is none, or where its checksum does not match."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        first, _, rest = path.read_bytes().partition(b"\n")
        if first.decode() == hashlib.sha256(rest).hexdigest():
            found: dict[str, Any] = json.loads(rest)
            return found
    return None


def write(path: Path, ranking: Mapping[str, Any]) -> None:
    """Cache a ranking as JSON under a line with its checksum."""
    content = json.dumps(dict(ranking)).encode()
    with contextlib.suppress(OSError, UserError):  # a full disk or a read-only folder costs only the cache
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)


@cache
def _code() -> str:
    """Hash all code of this package, and the versions of the libraries that fit and resample."""
    files = [file.read_bytes() for file in sorted(PACKAGE.rglob("*.py"))]
    versions = [f"{name} {version(name)}" for name in LIBRARIES] + [sys.version]
    return hashlib.sha256(b"\0".join([*files, *(one.encode() for one in versions)])).hexdigest()
