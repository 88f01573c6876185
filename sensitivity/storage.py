"""Opens the Optuna storage of a study: a journal file that survives being killed, or a database URL."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError

from sensitivity.errors import Notice, UserError, reason
from sensitivity.files import full

optuna.logging.set_verbosity(logging.WARNING)


class KernelLock(JournalFileOpenLock):
    """A lock that the kernel drops when its holder dies.

    Optuna's own locks are files: one left behind by a killed process blocks everybody for half a minute, and for
    ever when the journal's path is relative. Where the file system knows no locks (some network mounts), Optuna's
    is what remains.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._path = journal.with_suffix(".kernel-lock")
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        file = open(self._path, "ab")  # noqa: SIM115 - stays open for as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            file.close()
            return super().acquire()
        self._file = file
        return True

    def release(self) -> None:
        if self._file is None:
            super().release()
        else:
            self._file.close()  # closing drops the lock
            self._file = None


class Journal(JournalFileBackend):
    """Optuna's, of which a line stands in the file in full or not at all, on a disk that is full too."""

    def __init__(self, path: Path, lock: KernelLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._kernel = lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with held(self._kernel), open(self._file_path, "ab", buffering=0) as file:
            end, left = file.tell(), memoryview(lines)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)  # others would append to half a line
                raise full(Path(self._file_path), error) from error


@contextmanager
def held(lock: KernelLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def mend(journal: Path, lock: KernelLock) -> None:
    """Cut off a last line that a killed process or a full disk left half-written; Optuna would append to it."""
    if not journal.exists():
        return
    with held(lock):
        _cut(journal)


def _cut(journal: Path) -> None:
    with open(journal, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 65536)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end != size:
            file.truncate(end)


def open_storage(where: Path | str, known: bool = False) -> BaseStorage:
    """A journal file for a path, Optuna's database storage for a URL; one that is `known` to be right is waited for."""
    if isinstance(where, str) and "://" in where:
        began, told = time.monotonic(), False
        while True:
            try:
                return patient(_database(where))
            except Exception as error:  # whatever the driver raises, the user needs the same sentence
                why = f"cannot open the storage {without_password(where)}: {reason(error)}"
                if not known or not _lost(error) or time.monotonic() - began > PATIENCE:
                    raise UserError(why) from error
            if not told:
                warnings.warn(f"{why}; waiting for it", Notice, stacklevel=2)
                told = True
            time.sleep(AGAIN)
    journal = Path(where).absolute()
    if journal.exists() and not journal.is_file():
        raise UserError(f"{where} is not a study's journal: it is no file")
    lock = KernelLock(journal)
    try:
        mend(journal, lock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return JournalStorage(Journal(journal, lock))
    except OSError as error:
        raise full(Path(where), error) from error
    except Exception as error:  # whatever Optuna stumbles over: the lines are not those that it wrote
        raise UserError(
            f"{where} is not a study's journal, or is damaged (line {_damaged(journal)}); a copy of the study, or a "
            "new sweep in another --out, is what helps"
        ) from error


def _damaged(journal: Path) -> str:
    """The first line that is no entry of a journal, as far as that can be told without reading its sense."""
    with open(journal, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not isinstance(json.loads(line)["op_code"], int):
                    return str(number)
            except (ValueError, KeyError, TypeError, RecursionError):
                return str(number)
    return "unknown: each line is well formed, but they do not go together"


def check(url: str) -> None:
    """Whether a study can be kept in a database, before anything is made: no table there, no file here."""
    try:
        address = make_url(url)
        file = Path(address.database or "") if address.get_backend_name() == "sqlite" else None
        if file is not None and file.name in ("", ":memory:"):
            raise ValueError("a study in memory would be lost")
        if file is not None and not file.exists():
            if not file.absolute().parent.is_dir():
                raise FileNotFoundError(2, "no such folder", str(file.absolute().parent))
            return
        engine = create_engine(address)
        try:
            inspect(engine).get_table_names()
        finally:
            engine.dispose()
    except Exception as error:  # whatever the driver raises, the user needs the same sentence
        raise UserError(f"cannot open the storage {without_password(url)}: {reason(error)}") from error


def _database(url: str, tries: int = 5) -> RDBStorage:
    """Optuna's tables are made by whoever comes first; launchers that start together get in each other's way."""
    try:
        # a server that keeps texts without saying how (SQL_ASCII) gives them back as bytes, unless it is told
        utf8 = {"connect_args": {"client_encoding": "utf8"}} if url.startswith("postgresql") else {}
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **utf8})
    except (IntegrityError, ProgrammingError):
        if tries == 1:
            raise
        time.sleep(AGAIN)
        return _database(url, tries - 1)


def close(storage: BaseStorage) -> None:
    """Give back a database's connections; a journal holds none."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


PATIENCE = 300.0  # seconds that a database may be away
AGAIN = 0.5


def patient(storage: RDBStorage) -> RDBStorage:
    """A database that is away for some time is waited for, as a sweep may have days of work behind it."""
    public = [name for name in BaseStorage.__dict__ if not name.startswith("_")]
    private = ("_get_trials", "_create_new_trial", "_set_trial_param")  # which Optuna's cache in front of it calls
    for name in (*public, *private):
        if callable(getattr(storage, name)):
            setattr(storage, name, _waiting(getattr(storage, name)))
    return storage


def _waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    def patiently(*args: Any, **kwargs: Any) -> Any:
        began = None
        while True:
            try:
                return call(*args, **kwargs)
            except UpdateFinishedTrialError:
                if began is None:
                    raise
                return True  # it had been carried out before the connection was lost
            except (StorageInternalError, SQLAlchemyError) as error:
                if not _lost(error):
                    raise
                began = began or time.monotonic()
                if time.monotonic() - began > PATIENCE:
                    why = f"the database has been away for {PATIENCE:g} seconds ({reason(error)})"
                    raise UserError(f"{why}; the same command continues when it is back") from error
                time.sleep(AGAIN)

    return patiently


def _lost(error: BaseException) -> bool:
    """Whether it is the connection that failed, in whichever state, and not what was asked for."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SQLAlchemyError):
            return not isinstance(cause, IntegrityError | ProgrammingError | DataError)
        cause = cause.__cause__ or cause.__context__
    return False


def without_password(url: str) -> str:
    head, _, tail = url.partition("://")
    login, at, host = tail.rpartition("@")
    return f"{head}://{login.partition(':')[0]}{at}{host}"
