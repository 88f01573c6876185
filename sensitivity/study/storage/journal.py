"""Journal: Optuna's journal file, without half-written lines after a kill or on a full disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from sensitivity.spec.files import disk_error
from sensitivity.study.storage.process_lock import ProcessLock, held


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


def first_bad_line(journal: Path) -> str:
    """The number of the first line that does not have the form of a journal entry, for an error message."""
    with open(journal, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not isinstance(json.loads(line)["op_code"], int):
                    return str(number)
            except (ValueError, KeyError, TypeError, RecursionError):
                return str(number)
    return "unknown: each line is valid, but the lines contradict each other"
