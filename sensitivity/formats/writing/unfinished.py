"""Hidden folders of unfinished and of temporary exports, and the removal of what killed processes left."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sensitivity.formats.writing.manifest import why_foreign
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import (
    NO_SPACE,
    discard,
    disk_error,
    hidden_folder,
    is_unfinished,
    locked,
    move_into_place,
    restore,
)

NAME = re.compile(r"\.(.+)\.\d+\.\d+\.unfinished(\.old)?")  # target, process, time; .old: the export that it replaces


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the target, which is renamed to the target only if the block succeeds.

    The caller must have called `check_may_write`; the target is checked again before it is replaced.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(out.parent, but=out)
        with hidden_folder(out) as unfinished:
            yield unfinished
            _flush(unfinished)
            # locked while it is renamed, so that another process's `remove_unfinished` does not touch the old export
            with locked(out) if out.is_dir() else contextlib.nullcontext():
                move_into_place(unfinished, out, why_foreign)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(out, error) from error
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for folder in missing:  # created above; if the export failed, those that are empty are removed
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder for exports that nobody keeps; the next one removes what a killed process left.

    It may hold several models, which would soon fill the disk.
    """
    place = Path(tempfile.gettempdir(), f"sensitivity-{purpose}")
    remove_unfinished(place.parent)
    with hidden_folder(place, mode=0o700) as folder:  # others on the machine may not read the model
        yield folder


def remove_unfinished(parent: Path, but: Path | None = None) -> list[Path]:
    """Remove the folders that killed exports left in a folder, and restore an export that was moved away.

    but: a folder that stays whatever its name is, the target of the next export. Returns what was removed. A folder
    whose lock another process holds is being written, and stays.
    """
    removed = []
    for folder in sorted(parent.glob(".*.unfinished*")):
        if (name := NAME.fullmatch(folder.name)) is None or not folder.is_dir() or folder == but:
            continue
        with locked(folder) as free:
            if not free or not (is_unfinished(folder) or not why_foreign(folder)):
                continue
            if name[2] and not (parent / name[1]).exists():  # killed between the two renames of move_into_place
                restore(folder, parent / name[1])
            elif discard(folder, ours=True):
                removed.append(folder)
    return removed


def _flush(folder: Path) -> None:
    """Flush every file of a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # else the rename could reach the disk before the content
