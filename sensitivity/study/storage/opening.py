"""Opens the Optuna storage of a study: a journal file that survives a kill, or a database by its URL."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError

from sensitivity.spec.errors import Failed, Notice, UserError, reason
from sensitivity.spec.files import disk_error
from sensitivity.study.storage import waiting

optuna.logging.set_verbosity(logging.WARNING)

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}  # errors of a file system without locks
POLL = 0.01  # seconds between two attempts to take a lock


class ProcessLock(JournalFileOpenLock):
    """A lock between processes that the kernel releases when its holder dies.

    Optuna's own locks are files: one left behind by a killed process blocks all others for half a minute, and forever
    if the journal's path is relative (Optuna issue 5921). On a file system without locks (some network mounts) a lock
    file is used instead; filelock removes it when the process named in it is dead.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._file = path, path.with_suffix(".kernel-lock")
        self._lock: filelock.BaseFileLock = filelock.FileLock(self._file, poll_interval=POLL)

    def acquire(self) -> bool:
        """Wait for the lock and take it; an error of one sentence where no file can be made."""
        try:
            # filelock makes missing folders, and where no file can be made, as in /proc, it tries again without end
            if not os.path.lexists(self._file):
                self._file.touch()
            self._lock.acquire()
        except FileNotFoundError as error:
            where = self._path.parent
            why = "makes no files" if where.is_dir() else "is gone"
            raise Failed(f"cannot use {self._path}: the folder {where} {why}; choose another") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise disk_error(self._path, error) from error
            self._lock = filelock.SoftFileLock(self._path.with_suffix(".lock"), poll_interval=POLL)
            self._lock.acquire()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()


@contextmanager
def held(lock: ProcessLock) -> Iterator[None]:
    """Hold a lock for the length of a with block."""
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Journal(JournalFileBackend):
    """Optuna's journal file, to which a batch of lines is added whole or not at all, even on a full disk.

    A kill can still leave half a line, which the next writer cuts off.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._ours = path, ProcessLock(path)
        super().__init__(str(path), lock_obj=self._ours)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:  # Optuna's signature
        """Add lines under the lock; they are on disk when this returns."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with held(self._ours):
            cut_half_line(self._path)
            with open(self._path, "ab", buffering=0) as file:
                end, left = file.tell(), memoryview(lines)
                try:
                    while left:  # an unbuffered write may write only a part
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError as error:
                    file.truncate(end)  # else the next line is appended to half a line
                    raise disk_error(self._path, error) from error


def cut_half_line(journal: Path) -> None:
    """Cut off a half-written last line, which a killed process may have left; called before every write."""
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


def open_storage(where: Path | str, wait: bool = False) -> BaseStorage:
    """The journal at a path or the database at a URL; with `wait`, wait for a database that is down for a while."""
    if isinstance(where, str) and "://" in where:
        began, warned = time.monotonic(), False
        while True:
            try:
                return waiting.Patient(_database(where))  # type: ignore[abstract]
            except Exception as error:  # drivers raise errors of many types
                why = f"cannot open the storage {without_password(where)}: {reason(error)}"
                if not wait or not waiting.lost(error) or time.monotonic() - began > waiting.SECONDS:
                    raise UserError(why) from error
            if not warned:
                warnings.warn(f"{why}; waiting for it", Notice, stacklevel=2)
                warned = True
            time.sleep(waiting.AGAIN)
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
            f"{where} is not a study's journal, or is damaged (line {_damaged(journal)}); restore a "
            "copy of the study, or sweep into another --out"
        ) from error


def _damaged(journal: Path) -> str:
    """The number of the first line that is not shaped like a journal entry; its content is not checked."""
    with open(journal, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not isinstance(json.loads(line)["op_code"], int):
                    return str(number)
            except (ValueError, KeyError, TypeError, RecursionError):
                return str(number)
    return "unknown: each line is valid, but the lines contradict each other"


def check(url: str) -> None:
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


def _database(url: str, tries: int = 5) -> RDBStorage:
    """Optuna's database storage; tried again, as processes that start together all try to create its tables."""
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **_as_utf8(url)})
    except (IntegrityError, ProgrammingError):
        if tries == 1:
            raise
        time.sleep(waiting.AGAIN)
        return _database(url, tries - 1)


def close(storage: BaseStorage) -> None:
    """Close a database's connections; a journal has none."""
    if isinstance(storage, waiting.Patient):
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
