"""Opens the Optuna storage of a study: a journal file that survives a kill, or a database by its URL."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError

from sensitivity.spec.errors import Notice, UserError, reason
from sensitivity.spec.files import disk_error
from sensitivity.study.storage import retrying_storage
from sensitivity.study.storage.journal import Journal, first_bad_line
from sensitivity.study.storage.retrying_storage import RetryingStorage, is_connection_lost


def open_storage(where: Path | str, wait: bool = False) -> BaseStorage:
    """The journal at a path or the database at a URL; with `wait`, wait for a database that is down for a while."""
    if optuna.logging.get_verbosity() == logging.INFO:  # Optuna's default: a line for each trial, as we print ourselves
        optuna.logging.set_verbosity(logging.WARNING)
    if isinstance(where, str) and "://" in where:
        return _open_database(where, wait)
    journal = Path(where).absolute()
    if journal.exists() and not journal.is_file():
        raise UserError(f"{where} is not a study's journal: it is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return JournalStorage(Journal(journal))
    except OSError as error:
        raise disk_error(Path(where), error) from error
    except Exception as error:  # Optuna fails in many ways on lines that it did not write
        raise UserError(
            f"{where} is not a study's journal, or is damaged (line {first_bad_line(journal)}); restore a "
            "copy of the study, or sweep into another --out"
        ) from error


def check_database(url: str) -> None:
    """Raise an error where a study cannot be kept in this database; creates no table and no file."""
    try:
        address = make_url(url)
        file = Path(address.database or "") if address.get_backend_name() == "sqlite" else None
        if file is not None and file.name in ("", ":memory:"):
            raise ValueError("a study in memory would be lost")
        if file is not None and not file.exists():
            if not file.absolute().parent.is_dir():
                raise FileNotFoundError(2, "no such folder", str(file.absolute().parent))
            return
        engine = create_engine(address, **_as_utf8(url))
        try:
            inspect(engine).get_table_names()
        finally:
            engine.dispose()
    except Exception as error:  # drivers raise errors of many types
        raise UserError(f"cannot open the storage {without_password(url)}: {reason(error)}") from error


def _open_database(url: str, wait: bool) -> RetryingStorage:
    """The database at a URL; with `wait`, try again while it cannot be reached."""
    began, warned = time.monotonic(), False
    while True:
        try:
            return RetryingStorage(_database(url))  # type: ignore[abstract]
        except Exception as error:  # drivers raise errors of many types
            why = f"cannot open the storage {without_password(url)}: {reason(error)}"
            too_long = time.monotonic() - began > retrying_storage.LONGEST_OUTAGE
            if not wait or too_long or not is_connection_lost(error):
                raise UserError(why) from error
        if not warned:
            warnings.warn(f"{why}; waiting for it", Notice, stacklevel=3)
            warned = True
        time.sleep(retrying_storage.RETRY_AFTER)


def _database(url: str, tries: int = 5) -> RDBStorage:
    """Optuna's database storage; tried again, as processes that start together all try to create its tables."""
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **_as_utf8(url)})
    except (IntegrityError, ProgrammingError):
        if tries == 1:
            raise
        time.sleep(retrying_storage.RETRY_AFTER)
        return _database(url, tries - 1)


def close(storage: BaseStorage) -> None:
    """Close a database's connections; a journal has none."""
    if isinstance(storage, RetryingStorage):
        storage.remove_session()
        storage.database.engine.dispose()


def without_password(url: str) -> str:
    """A URL as it may be shown in messages."""
    head, _, tail = url.partition("://")
    login, at, host = tail.rpartition("@")
    return f"{head}://{login.partition(':')[0]}{at}{host}"


def _as_utf8(url: str) -> dict[str, dict[str, str]]:
    """Ask PostgreSQL for UTF-8: a server that keeps texts without an encoding (SQL_ASCII) gives them back as bytes."""
    return {"connect_args": {"client_encoding": "utf8"}} if url.startswith("postgresql") else {}
