"""Where a study's trials are stored: a journal in its folder, or the database whose URL a file there holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.files import NO_SPACE, disk_error, new_folder, write_atomically
from sensitivity.study.storage.opening import check_database, without_password
from sensitivity.study.storage.paths import ADDRESS, FIRST_FILES, JOURNAL, is_study, strangers, verification_folder


def address(path: Path) -> str | None:
    """The URL of the database that a study's folder names; None where its trials are in a journal."""
    file = path / ADDRESS
    if not file.exists():
        return None
    try:
        url = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except (OSError, ValueError):
        url = ""
    if "://" not in url:
        raise UserError(f"{file} names no database; it must hold one line such as postgresql+psycopg://HOST/DB")
    return url


def database_for(path: Path, asked: str | None) -> str | None:
    """The URL of the database to use for a folder; an error where another one would hide trials that exist."""
    if asked is not None and "://" not in asked:
        raise UserError(f"'{asked}' is not a storage; give a URL such as postgresql+psycopg://HOST/DB")
    present = address(path)
    if asked is None or asked == present:
        return present
    storage = None if present is None else without_password(present)
    if storage is None and (path / JOURNAL).exists():
        storage = JOURNAL
    if storage is not None:
        raise UserError(
            f"{path} holds a study whose trials are in {storage}, and --storage would hide them; leave out --storage, "
            "or choose another --out"
        )
    return asked


def reachable_database(path: Path, asked: str | None) -> str | None:
    """The URL of the database to use; one that is new to this folder is checked to be reachable."""
    url = database_for(path, asked)  # the folder's own database may be down for a while: opening it waits
    if url is not None and url != address(path):
        check_database(url)
    return url


def write_address(path: Path, url: str) -> None:
    """Store the URL of the database in a study's folder."""
    write_atomically(path / ADDRESS, url.encode())


def check_begins(path: Path) -> None:
    """Raise an error where a study would be begun among files that are not its own."""
    if not is_study(path) and (others := strangers(path)):
        raise UserError(f"{path} holds no study, and other files ({others[0]}); choose a new folder as --out")


def check_stores(study: Path, verifies: bool = False) -> None:
    """Raise an error where a study may not be written, such as another user's.

    If it verifies plans, there may be no other files in the folder for that.
    """
    fresh = verification_folder(study)
    for folder in (study, fresh):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            word = shell_word(study)
            raise UserError(
                f"{folder} may not be written, and results are kept there; copy the study (`cp -r {word} COPY`, then "
                "`chmod -R u+w COPY`) and use the copy"
            )
    if verifies and not is_study(fresh) and (others := strangers(fresh)):
        raise UserError(
            f"{fresh} is where plans are verified, and holds other files ({others[0]}); move them elsewhere"
        )


@contextlib.contextmanager
def study_folder(path: Path) -> Iterator[None]:
    """Create a study's folder; remove it again if the study cannot be created in it."""
    try:
        with new_folder(path, FIRST_FILES):
            yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(path, error) from error
        why = error.strerror or "it cannot be written"
        raise UserError(f"a study cannot be kept in {path} ({why}); choose another --out") from error
