"""A cache of rankings in the study's folder, keyed by trials, arguments and code; safe to delete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

from sensitivity.analysis.importance.types import RankingJson
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import PACKAGE, write_atomically
from sensitivity.study.storage import paths
from sensitivity.study.study import Study

LIBRARIES = ("numpy", "scipy", "pandas", "scikit-learn", "optuna")  # whose versions are part of the key


def file_of(study: Study, task: str, options: object) -> Path:
    """The file of a ranking, whose name is a hash of all that it depends on: trials, arguments and code."""
    trials = [[t.state.name, t.key, t.size, t.scores, t.versions] for t in study.measurements()]
    content = json.dumps([_code(), task, repr(options), study.parts.to_json(), trials], sort_keys=True, default=str)
    return paths.ranking_file(study.path, hashlib.sha256(content.encode()).hexdigest()[:24])


def read(path: Path) -> RankingJson | None:
    """The cached ranking as JSON; None where there is none, or where its checksum does not match."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        first, _, rest = path.read_bytes().partition(b"\n")
        if first.decode() == hashlib.sha256(rest).hexdigest():
            ranking: RankingJson = json.loads(rest)
            return ranking
    return None


def write(path: Path, ranking: RankingJson) -> None:
    """Cache a ranking as JSON under a line with its checksum."""
    content = json.dumps(ranking).encode()
    with contextlib.suppress(OSError, UserError):  # a full disk or a read-only folder costs only the cache
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)


@cache
def _code() -> str:
    """Hash all code of this package, and the versions of the libraries that fit and resample."""
    files = [file.read_bytes() for file in sorted(PACKAGE.rglob("*.py"))]
    versions = [f"{name} {version(name)}" for name in LIBRARIES] + [sys.version]
    return hashlib.sha256(b"\0".join([*files, *(one.encode() for one in versions)])).hexdigest()
