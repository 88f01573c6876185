"""Hidden folders of unfinished and of temporary exports: locked while their process runs, removed if it was killed."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from sensitivity.formats.writing.manifest import why_foreign
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import (
    NO_SPACE,
    begin_folder,
    discard,
    disk_error,
    is_unfinished,
    mark_unfinished,
    move_into_place,
    restore,
)

NAME = re.compile(r"\.(.+)\.\d+\.\d+\.unfinished(\.old)?")  # target, process, time; .old: the export that it replaces


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the target, which is renamed to the target only if the block succeeds.

    The caller must have called `check_may_write`; the target is checked again before it is replaced.
    """
    made = out.with_name(f".{out.name}.{os.getpid()}.{time.monotonic_ns()}")
    unfinished = made.with_name(f"{made.name}.unfinished")
    begun = False
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(out.parent, but=out)
        begin_folder(made)
        begun = True
        with _locked(made):  # lock it before it gets a name that another process's `remove_unfinished` looks at
            made.rename(unfinished)
            yield unfinished
            _flush(unfinished)
            # locked while it is renamed, so that another process's `remove_unfinished` does not touch the old export
            with _locked(out) if out.is_dir() else contextlib.nullcontext():
                move_into_place(unfinished, out, why_foreign)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(out, error) from error
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for folder in (made, unfinished):  # both names contain our process id and a time, so no other process uses them
            discard(folder, ours=begun)
        for folder in missing:  # created above; if the export failed, those that are empty are removed
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder for exports that nobody keeps; the next one removes what a killed process left.

    It may hold several models, which would soon fill the disk.
    """
    made = Path(tempfile.gettempdir(), f".sensitivity-{purpose}.{os.getpid()}.{time.monotonic_ns()}")
    unfinished = made.with_name(f"{made.name}.unfinished")
    remove_unfinished(made.parent)
    made.mkdir(mode=0o700)  # others on the machine may not read the model
    try:
        mark_unfinished(made)
        with _locked(made):  # before it gets a name that another process's `remove_unfinished` looks at
            made.rename(unfinished)
            yield unfinished
    finally:
        for folder in (made, unfinished):
            discard(folder, ours=True)


def remove_unfinished(parent: Path, but: Path | None = None) -> list[Path]:
    """Remove the folders that killed exports left in a folder, and restore an export that was moved away.

    but: a folder that stays whatever its name is, the target of the next export. Returns what was removed. A folder
    whose lock another process holds is being written, and stays.
    """
    removed = []
    for folder in sorted(parent.glob(".*.unfinished*")):
        if (name := NAME.fullmatch(folder.name)) is None or not folder.is_dir() or folder == but:
            continue
        with _locked(folder) as free:
            if not free or not (is_unfinished(folder) or not why_foreign(folder)):
                continue
            if name[2] and not (parent / name[1]).exists():  # killed between the two renames of move_into_place
                restore(folder, parent / name[1])
            elif discard(folder, ours=True):
                removed.append(folder)
    return removed


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Try to lock a folder; yields whether it is locked now. The kernel unlocks it when the process ends.

    On file systems without locks on folders (some network mounts) this always fails, so nothing is removed.
    """
    try:
        place = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        free = False
        with contextlib.suppress(OSError):
            free = filelock.lock_descriptor(place, blocking=False)
        yield free
    finally:
        os.close(place)


def _flush(folder: Path) -> None:
    """Flush every file of a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # else the rename could reach the disk before the content
