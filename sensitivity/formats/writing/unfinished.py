"""The hidden folder in which an export grows beside its target: held while its process lives, cleared when it died."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from sensitivity.formats.writing.manifest import why_foreign
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import begin_folder, discard, is_unfinished, put_back, put_in_place

NAME = re.compile(r"\.(.+)\.\d+\.\d+\.unfinished(\.old)?")  # of what, by which process, when; what it had replaced


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the target, which takes its place only when all is written.

    The caller has asked `may_write` before; what is there is looked at again before it is replaced.
    """
    made = out.with_name(f".{out.name}.{os.getpid()}.{time.monotonic_ns()}")
    unfinished = made.with_name(f"{made.name}.unfinished")
    begun = False
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear(out.parent)
        begin_folder(made)
        begun = True
        with _held(made):  # before it has a name under which another process may clear it
            made.rename(unfinished)
            yield unfinished
            _flush(unfinished)
            with _held(out) if out.is_dir() else contextlib.nullcontext():
                put_in_place(unfinished, out, why_foreign)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for folder in (made, unfinished):  # names that no other process gives
            discard(folder, ours=begun)
        for folder in missing:  # a failed export leaves no folder behind
            with contextlib.suppress(OSError):
                folder.rmdir()


def clear(parent: Path) -> list[Path]:
    """Remove what exports into a folder left behind when they were killed; what was there before comes back."""
    gone = []
    for folder in sorted(parent.glob(".*.unfinished*")):
        if (name := NAME.fullmatch(folder.name)) is None or not folder.is_dir():
            continue
        with _held(folder) as free:
            if not free or not (is_unfinished(folder) or not why_foreign(folder)):
                continue
            if name[2] and not (parent / name[1]).exists():  # killed between two renamings
                put_back(folder, parent / name[1])
            elif discard(folder, ours=True):
                gone.append(folder)
    return gone


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds a folder, and hold it; the kernel lets go of it when the process dies.

    Where the file system knows no locks on folders (some network mounts), nothing is ever free to be cleared.
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
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # a name must not be on disk before its content is
