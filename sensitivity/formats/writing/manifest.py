"""The manifest of an export: its plan, and each file's hash, by which damage is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensitivity.spec import schema
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import MARK, UNFINISHED, finite, write_whole
from sensitivity.study.exports import MANIFEST, VERIFIED

__all__ = ["MANIFEST", "VERIFIED", "damage", "note", "read", "sha256", "why_foreign", "write"]


def sha256(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(folder: Path, facts: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Write the manifest, the last file of an export; `known` holds hashes that were computed while writing."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": known.get(file.name) or sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != UNFINISHED
    }
    content = json.dumps(finite({**facts, "written_by": MARK, "files": files}), indent=1, default=str) + "\n"
    (folder / MANIFEST).write_text(content, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an export, or an error that says what is wrong with it."""
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is no export: it has no {MANIFEST}; `sensitivity export` writes one")
    found = schema.read(folder / MANIFEST, "manifest", "export again")
    if outside := [name for name in found["files"] if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{MANIFEST} of {folder} names {schema.shown(outside[0])}, which lies elsewhere; export again")
    return found


def why_foreign(out: Path) -> str:
    """Why a path is not an export of ours and nothing else; an empty string if it is."""
    if not out.is_dir():
        return "it is a file, and a folder is meant"
    try:
        found = read(out)
    except UserError:
        return f"it holds other things than an export (no {MANIFEST} of ours)"
    if found.get("written_by") != MARK:
        return f"its {MANIFEST} has no mark that an export left"
    ours = {MANIFEST, VERIFIED, UNFINISHED, *found["files"]}
    others = sorted(
        str(file.relative_to(out))
        for file in out.rglob("*")
        if (not file.is_dir() or file.is_symlink()) and file.relative_to(out).as_posix() not in ours
    )
    return f"it also holds {', '.join(others[:3])}, which no export wrote" if others else ""


def damage(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that are missing, cut short or changed since they were written, and weight files that were added."""
    found = []
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        # the size first: it is free, and hashing reads the whole file
        elif (size := file.stat().st_size) != facts["bytes"]:
            found.append(f"{name} has {size:,} bytes instead of {facts['bytes']:,}")
        elif sha256(file) != facts["sha256"]:
            found.append(f"{name} was changed")
    added = {file.name for file in folder.glob("*.safetensors")} - set(manifest["files"])
    return found + [f"{name} was added" for name in sorted(added)]


def note(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Store the outcome of a verification in a file of its own, which the manifest does not hash."""
    write_whole(folder / VERIFIED, (json.dumps(finite(outcome), indent=1, default=str) + "\n").encode())
