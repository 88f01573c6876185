"""Where a study keeps its trials: in a journal in its folder, or in the database that a file there names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.errors import UserError
from sensitivity.spec.files import NO_SPACE, full, making, write_whole
from sensitivity.study.storage.opening import check, without_password

ADDRESS = "storage.url"
JOURNAL = "journal.log"
OURS = (ADDRESS, JOURNAL, "journal.kernel-lock", "queue.kernel-lock")  # what a study that was never begun has left


def address(path: Path) -> str | None:
    """The database that a study's folder names; None where its trials are in a journal."""
    file = path / ADDRESS
    if not file.exists():
        return None
    try:
        found = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except (OSError, ValueError):
        found = ""
    if "://" not in found:
        raise UserError(f"{file} names no database; it holds one line such as postgresql+psycopg://HOST/DB")
    return found


def agreed(path: Path, asked: str | None) -> str | None:
    """The database to use for a folder, if that hides no trials that are kept elsewhere."""
    if asked is not None and "://" not in asked:
        raise UserError(f"'{asked}' is no storage; it is a URL such as postgresql+psycopg://HOST/DB")
    known = address(path)
    if asked is None or asked == known:
        return known
    there = None if known is None else without_password(known)
    if there is None and (path / JOURNAL).exists():
        there = JOURNAL
    if there is not None:
        raise UserError(
            f"{path} holds a study whose trials are in {there}, and --storage would hide them; leave --storage away, "
            "or choose another --out"
        )
    return asked


def usable(path: Path, asked: str | None) -> str | None:
    """The same, if it answers; a database that served the folder before may be away for a while."""
    chosen = agreed(path, asked)
    if chosen is not None and chosen != address(path):
        check(chosen)
    return chosen


def write(path: Path, url: str) -> None:
    write_whole(path / ADDRESS, url.encode())


@contextlib.contextmanager
def made(path: Path) -> Iterator[None]:
    """The folder of a study; what this made of it goes again where the study could not be begun."""
    try:
        with making(path, OURS):
            yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise full(path, error) from error
        why = error.strerror or "it cannot be written"
        raise UserError(f"a study cannot be kept in {path} ({why}); choose another --out") from error
