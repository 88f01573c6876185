"""Files that are there in full or not at all; the only place that deletes or replaces, and only what we wrote."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensitivity.spec.errors import Failed, UserError

if TYPE_CHECKING:
    import pandas as pd

MARK = "sensitivity"  # the value of "written_by" in a manifest, and the content of UNFINISHED
UNFINISHED = ".unfinished"  # a file in each folder that is still being written
PACKAGE = Path(__file__).resolve().parents[1]

# says why a path is not one that we wrote; an empty string where it is ours
WhyForeign = Callable[[Path], str]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full(target: Path, error: OSError) -> Failed:
    """What could not be written or read, and what helps, instead of a number of the system's."""
    if error.errno in NO_SPACE:
        return Failed(
            f"no space is left for {target}; what was finished is kept: make room, and the same command goes on"
        )
    return Failed(f"cannot use {target}: {error.strerror or type(error).__name__}")


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary name beside a file, moved into place only when the block ends well."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    except OSError as error:
        raise full(target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def making(folder: Path, ours: Iterable[str] = ()) -> Iterator[None]:
    """Make a folder; where the block fails, what was made goes again: our files in it, by name, and empty folders."""
    before = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for name in ours if before else ():
                (folder / name).unlink(missing_ok=True)
            for place in before:
                place.rmdir()  # only what is empty
        raise


def finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_of(rows: pd.DataFrame) -> bytes:
    """Rows as CSV, in which no text passes for a formula when a spreadsheet opens it (OWASP: CSV injection)."""

    def inert(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    plain = rows.map(inert)
    plain.columns = [inert(name) for name in rows.columns]
    return bytes(plain.to_csv(index=False).encode())


def write_whole(target: Path, content: bytes) -> None:
    with whole(target) as unfinished:
        unfinished.write_bytes(content)


def write_again(target: Path, text: str) -> None:
    """Write a document of ours, over an earlier one that begins with the same line; any other file stays."""
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file")
    first = text.partition("\n")[0]
    if target.exists():
        with target.open("rb") as file:
            found = file.read(len(first.encode()) + 2)
        if found.rstrip(b"\r\n").partition(b"\n")[0].rstrip(b"\r") != first.encode():
            raise UserError(f"{target} is another file: it does not begin with '{first}'; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text.encode())


def may_write(out: Path, force: bool, why_foreign: WhyForeign, keep: Iterable[Path] = ()) -> None:
    """Refuse a target where something would be lost: a folder or a file that is there and not ours, or not `force`.

    Whatever is in `keep` (a study, a model, a plan, a cache) must not be the target or lie in it.
    """
    if why := _why_never(out, keep):
        raise UserError(f"{out} {why}; choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"{out} is already there; choose another --out or add --force")
    if why := why_foreign(out):
        raise UserError(f"{out} is not replaced: {why}; choose another --out")


def _why_never(out: Path, keep: Iterable[Path]) -> str:
    """Why a target is never written to, whatever is in it; an empty string where it may be."""
    if not str(out) or out == Path():
        return "is the working folder"
    if out.is_symlink():
        return "is a link"
    place = _real(out)
    if place in (*PACKAGE.parents, PACKAGE) or PACKAGE in place.parents:
        return "holds this package or lies in it"
    if place == _real(Path.cwd()) or place in _real(Path.cwd()).parents:
        return "is the working folder or holds it"
    if place in _homes():
        return "is a home folder or holds one"
    if os.path.ismount(place):
        return "is where a file system is mounted"
    for kept in keep:
        found = _real(kept)
        if place == found or place in found.parents:
            return f"is or holds {kept}, which is being read"
    return ""


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `resolve` raises where links go in a circle


def _homes() -> set[Path]:
    homes = [Path.home()]
    with contextlib.suppress(ImportError):  # not on Windows
        import pwd

        homes += [Path(user.pw_dir) for user in pwd.getpwall() if user.pw_dir]
    found = {_real(home) for home in homes}
    return found | {parent for home in found for parent in home.parents}


def begin_folder(folder: Path) -> None:
    """Make a folder with the mark of what is being written."""
    folder.mkdir()
    (folder / UNFINISHED).write_text(MARK, encoding="utf-8")


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is one that `begin_folder` made and nobody finished."""
    try:
        return not folder.is_symlink() and (folder / UNFINISHED).read_text(encoding="utf-8") == MARK
    except (OSError, UnicodeDecodeError):
        return False


def put_in_place(folder: Path, out: Path, why_foreign: WhyForeign) -> None:
    """Move a folder that is finished to its target; what it replaces stays beside it until then."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    if not out.is_dir() or out.is_symlink():
        if out.exists() or out.is_symlink():
            raise UserError(f"{out} has appeared meanwhile; nothing was replaced")
        os.replace(folder, out)
        return
    if not any(out.iterdir()):
        out.rmdir()
        os.replace(folder, out)
        return
    old = folder.with_name(folder.name + ".old")
    os.replace(out, old)
    if why := why_foreign(old):  # it has changed since it was checked
        os.replace(old, out)
        raise UserError(f"{out} is not replaced: {why}; choose another --out")
    os.replace(folder, out)
    shutil.rmtree(old)


def put_back(old: Path, out: Path) -> None:
    """Give back its name to what was moved away, where nothing has taken it."""
    if not out.exists() and not out.is_symlink():
        os.replace(old, out)


def discard(path: Path, ours: bool) -> bool:
    """Delete a file or a folder that the caller has recognized as ours; whether it is gone."""
    if not ours or path.is_symlink():
        return False
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()
