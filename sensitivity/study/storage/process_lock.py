"""ProcessLock: a lock between processes that the kernel releases when its holder dies."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from optuna.storages.journal import JournalFileOpenLock

from sensitivity.spec.errors import Failed
from sensitivity.spec.files import disk_error

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}  # errors of a file system without locks
POLL = 0.01  # seconds between two attempts to take a lock


class ProcessLock(JournalFileOpenLock):
    """A lock for one process at a time, which the kernel releases when its holder dies.

    Optuna's own locks are files: one left behind by a killed process blocks all others for half a minute, and forever
    if the journal's path is relative (Optuna issue 5921). On a file system without locks (some network mounts) a lock
    file is used instead; filelock removes it when the process named in it is dead.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._file = path, path.with_suffix(".kernel-lock")
        self._lock: filelock.BaseFileLock = filelock.FileLock(self._file, poll_interval=POLL)

    def acquire(self) -> bool:
        """Wait for the lock and take it; raise an error where its file cannot be made."""
        try:
            # filelock makes missing folders, and where no file can be made, as in /proc, it tries again without end
            if not os.path.lexists(self._file):
                self._file.touch()
            self._lock.acquire()
        except FileNotFoundError as error:
            where = self._path.parent
            why = f"no file can be made in {where}" if where.is_dir() else f"the folder {where} is gone"
            raise Failed(f"cannot use {self._path}: {why}; choose another folder") from error
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
