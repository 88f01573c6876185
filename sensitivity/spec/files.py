"""Atomic writes; deletes and replaces files and folders, but never one that we did not write."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from sensitivity.spec.errors import Failed, NoSpace, UserError

if TYPE_CHECKING:
    import pandas as pd

MARK = "sensitivity"  # the value of "written_by" in a manifest, and the content of UNFINISHED
UNFINISHED = ".unfinished"  # a marker file in each folder that is still being written
PACKAGE = Path(__file__).resolve().parents[1]

# a function that returns why a path is not one that we wrote, or an empty string if we wrote it
WhyForeign = Callable[[Path], str]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def slug(name: str) -> str:
    """A task's name as a part of a file name or an HTML id."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "task"


def disk_error(target: Path, error: OSError) -> Failed:
    """The error for a file that could not be written or read, with what the user can do about a full disk."""
    if error.errno in NO_SPACE:
        return NoSpace(f"no space is left for {target}; free some space")
    return Failed(f"cannot use {target}: {error.strerror or type(error).__name__}")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside a file, which replaces the file only if the block succeeds.

    The rename is atomic, so that a reader sees the old content or the new, never a part.
    """
    # in the same folder, since a rename is atomic only within one file system; process and time keep names apart
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path, ours: Iterable[str] = ()) -> Iterator[None]:
    """Create a folder; if the block fails, remove what was created: the files named in `ours`, and empty folders."""
    # folders that do not exist yet, the innermost first: only these may be removed again
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for name in ours if missing else ():
                (folder / name).unlink(missing_ok=True)
            for place in missing:
                place.rmdir()  # fails unless it is empty, so nothing else is lost
        raise


def finite(value: object) -> object:
    """The value with null in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_bytes(rows: pd.DataFrame) -> bytes:
    """Rows as CSV whose text no spreadsheet runs as a formula (OWASP: CSV injection).

    Text that begins with =, +, -, @, a tab or a carriage return gets an apostrophe in front, so that spreadsheets read
    it as text.
    """

    def inert(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    plain = rows.map(inert)
    plain.columns = [inert(name) for name in rows.columns]
    return bytes(plain.to_csv(index=False).encode())


def write_atomically(target: Path, content: bytes) -> None:
    """Replace a file atomically by one with this content."""
    with replacing(target) as unfinished:
        unfinished.write_bytes(content)


def overwrite(target: Path, text: str) -> None:
    """Write a text file; an existing file is replaced only if its first line is the same."""
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file")
    first = text.partition("\n")[0]
    if target.exists():
        with target.open("rb") as file:
            # two bytes more than the line, to see that it ends there, with \n or with \r\n
            begins = file.read(len(first.encode()) + 2)
        if begins.rstrip(b"\r\n").partition(b"\n")[0].rstrip(b"\r") != first.encode():
            raise UserError(f"{target} is another file: it does not begin with '{first}'; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text.encode())


def check_may_write(out: Path, force: bool, why_foreign: WhyForeign, keep: Iterable[Path] = ()) -> None:
    """Raise an error unless `out` may be written: it is free, or we wrote it and `force` is given.

    It may neither be nor contain anything in `keep` (a study, a model, a plan, a cache).
    """
    if why := _why_never(out, keep):
        raise UserError(f"{out} {why}; choose another --out")
    folder = next(place for place in (out, *out.absolute().parents) if place.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} may not be written; choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if why := why_foreign(out):  # before --force is advised
        raise UserError(f"{out} is not replaced: {why}; choose another --out")
    if not force:
        raise UserError(f"{out} is already there; choose another --out or add --force (in Python, force=True)")


def check_may_replace(file: Path, why_foreign: WhyForeign) -> None:
    """Raise an error where a file with a fixed name, such as a study's plan.json, is there and is not ours."""
    why = "it is a link" if file.is_symlink() else why_foreign(file) if file.exists() else ""
    if why:
        raise UserError(f"{file} is not replaced: {why}; move it away")


def rename_ours(file: Path, name: Path, why_foreign: WhyForeign) -> None:
    """Give a file that we wrote another name, which is free or that of a file that we wrote."""
    for one in (file, name):
        check_may_replace(one, why_foreign)
    os.replace(file, name)


def _why_never(out: Path, keep: Iterable[Path]) -> str:
    """Why nothing is ever written to a target, whatever it holds; an empty string if it is allowed."""
    if not str(out) or out == Path():
        return "is the working folder"
    if out.is_symlink():
        return "is a link"
    place = _without_links(out)
    if place in (*PACKAGE.parents, PACKAGE) or PACKAGE in place.parents:
        return "holds this package or lies in it"
    if place == _without_links(Path.cwd()) or place in _without_links(Path.cwd()).parents:
        return "is the working folder or holds it"
    if place in _homes():
        return "is a home folder or holds one"
    if os.path.ismount(place):
        return "is where a file system is mounted"
    for kept in keep:
        real = _without_links(kept)
        if place == real or place in real.parents:
            return f"is or holds {kept}, which is being read"
    return ""


def _without_links(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `resolve` raises on a cycle of links


def _homes() -> set[Path]:
    """The home folders of all users, and the folders that contain them."""
    # of all users, since root could replace another user's home folder
    homes = [Path.home()]
    with contextlib.suppress(ImportError):  # Windows has no pwd
        import pwd

        homes += [Path(user.pw_dir) for user in pwd.getpwall() if user.pw_dir]
    folders = {_without_links(home) for home in homes}
    return folders | {parent for home in folders for parent in home.parents}


def begin_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder that carries the mark of an unfinished one."""
    folder.mkdir(mode)
    mark_unfinished(folder)


@contextlib.contextmanager
def hidden_folder(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """A folder beside a target, with a mark and a lock until the block ends, and then removed if it is still there.

    What a killed process leaves has no lock, and is known as ours by its mark.
    """
    # both names contain our process id and a time, so no other process uses them
    made = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}")
    unfinished, begun = made.with_name(f"{made.name}.unfinished"), False
    try:
        begin_folder(made, mode)
        begun = True
        with locked(made):  # before it gets a name at which other processes look for what was left
            made.rename(unfinished)
            yield unfinished
    finally:
        for folder in (made, unfinished):
            discard(folder, ours=begun)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
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


def mark_unfinished(folder: Path) -> None:
    """Mark a new folder as one that we are writing, so that leftovers of a kill or a full disk are known as ours."""
    mark = folder / UNFINISHED
    try:
        mark.write_text(MARK, encoding="utf-8")
    except OSError as error:
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty
        if error.errno in NO_SPACE:
            raise disk_error(folder, error) from error
        raise


def mark_finished(folder: Path) -> None:
    """Remove the mark, if there is one."""
    (folder / UNFINISHED).unlink(missing_ok=True)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is marked as one that we began and did not finish."""
    try:
        return not folder.is_symlink() and (folder / UNFINISHED).read_text(encoding="utf-8") == MARK
    except (OSError, UnicodeDecodeError):
        return False


def move_into_place(folder: Path, out: Path, why_foreign: WhyForeign) -> None:
    """Move a finished folder to its target; what it replaces is deleted only after the move.

    A kill between two renames leaves the old folder under a name from which `restore` brings it back.
    """
    mark_finished(folder)
    if not out.is_dir() or out.is_symlink():
        if out.exists() or out.is_symlink():
            raise UserError(f"{out} has appeared meanwhile; nothing was replaced")
        os.replace(folder, out)
        return
    if not any(out.iterdir()):
        out.rmdir()
        os.replace(folder, out)
        return
    # a folder that is not empty cannot be replaced by one rename, so the old one is moved away first
    old = folder.with_name(folder.name + ".old")
    os.replace(out, old)
    # checked again, as it may have changed since `check_may_write`; under the new name no other program writes to it
    if why := why_foreign(old):
        os.replace(old, out)
        raise UserError(f"{out} is not replaced: {why}; choose another --out")
    os.replace(folder, out)
    shutil.rmtree(old)


def restore(old: Path, out: Path) -> None:
    """Rename an old folder back to `out`, unless something else is there now."""
    if not out.exists() and not out.is_symlink():
        os.replace(old, out)


def discard(path: Path, ours: bool) -> bool:
    """Delete a file or folder if the caller says that it is ours; returns whether it is gone."""
    if not ours or path.is_symlink():
        return False
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()
