"""Where a study's trials are stored: a journal in its folder, or the database whose URL a file there holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.errors import UserError
from sensitivity.spec.files import NO_SPACE, disk_error, new_folder, write_atomically
from sensitivity.study.storage.opening import check, without_password

ADDRESS = "storage.url"
JOURNAL = "journal.log"
OURS = (ADDRESS, JOURNAL, "journal.kernel-lock", "queue.kernel-lock")  # all files of a study before its first trial


def address(path: Path) -> str | None:
    """The URL of the database that a study's folder names; None where its trials are in a journal."""
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
    """The URL of the database to use for a folder; an error where another one would hide trials that exist."""
    if asked is not None and "://" not in asked:
        raise UserError(f"'{asked}' is not a storage; give a URL such as postgresql+psycopg://HOST/DB")
    known = address(path)
    if asked is None or asked == known:
        return known
    there = None if known is None else without_password(known)
    if there is None and (path / JOURNAL).exists():
        there = JOURNAL
    if there is not None:
        raise UserError(
            f"{path} holds a study whose trials are in {there}, and --storage would hide them; leave out --storage, "
            "or choose another --out"
        )
    return asked


def usable(path: Path, asked: str | None) -> str | None:
    """The URL of the database to use, checked to be reachable where it is new to this folder."""
    chosen = agreed(path, asked)  # a known one may be away for a while: it is waited for when it is opened
    if chosen is not None and chosen != address(path):
        check(chosen)
    return chosen


def write(path: Path, url: str) -> None:
    """Store the URL of the database in a study's folder."""
    write_atomically(path / ADDRESS, url.encode())


@contextlib.contextmanager
def made(path: Path) -> Iterator[None]:
    """Create a study's folder; remove what was created where the study then cannot be begun."""
    try:
        with new_folder(path, OURS):
            yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(path, error) from error
        why = error.strerror or "it cannot be written"
        raise UserError(f"a study cannot be kept in {path} ({why}); choose another --out") from error
