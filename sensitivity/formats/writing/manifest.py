"""The manifest of an export: its plan, and each file's hash, from which damaged files are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from sensitivity.spec import schema
from sensitivity.spec.errors import UserError
from sensitivity.spec.fields import quoted
from sensitivity.spec.files import MARK, UNFINISHED, finite, write_atomically
from sensitivity.spec.sizes import SizeJson
from sensitivity.study.exports import BENCH, MANIFEST, VERIFIED
from sensitivity.study.scores import TaskScore

__all__ = ["MANIFEST", "VERIFIED", "damaged_files", "read", "sha256", "store_verification", "why_foreign", "write"]


class FileFacts(TypedDict):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class StoredJson(TypedDict):
    """The tensors that an export wrote."""

    bytes: int
    bpw: float
    components: dict[str, int]
    headers: int


class DataFacts(TypedDict, total=False):
    """On which data a plan was measured."""

    tasks: list[str]
    n: int
    seed: int
    data: dict[str, str]
    whole_answers: bool


class TrialFacts(TypedDict, total=False):
    """What an export stores from the trial of its plan; empty for a plan that was never measured."""

    scores: Mapping[str, TaskScore] | None
    full_precision_scores: Mapping[str, TaskScore]
    answers: list[dict[str, object]]  # how many changed, were empty or were cut off, by task and kind of question
    path: str | None
    versions: Mapping[str, str] | None
    meta: DataFacts
    note: str | None
    path_gain: dict[str, object]


class Manifest(TypedDict):
    """The fields of a manifest that are read here; its JSON schema lists every field."""

    key: str
    model: str
    format: str
    dtype: str
    runs: bool
    trial: TrialFacts
    size: SizeJson
    predicted_size: SizeJson
    written: NotRequired[StoredJson]
    files: dict[str, FileFacts]
    written_by: NotRequired[str]


def sha256(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(folder: Path, facts: Mapping[str, object], known: Mapping[str, str]) -> None:
    """Write the manifest, the last file of an export; `known` has the hashes that were computed while writing."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": known.get(file.name) or sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != UNFINISHED
    }
    content = json.dumps(finite({**facts, "written_by": MARK, "files": files}), indent=1, default=str) + "\n"
    (folder / MANIFEST).write_text(content, encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of an export, or an error that says what is wrong with it."""
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, and an export is a folder: a plan alone answers nothing that could be compared"
        )
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is not an export: it has no {MANIFEST}; `sensitivity export` writes one")
    manifest: Manifest = schema.read(folder / MANIFEST, "manifest", "export again")
    if outside := [name for name in manifest["files"] if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{MANIFEST} of {folder} names {quoted(outside[0])}, which lies elsewhere; export again")
    return manifest


def why_foreign(out: Path) -> str:
    """Why a path is not an export of ours, or what else it holds; an empty string if it is only an export."""
    if not out.is_dir():
        return "it is a file, not a folder"
    try:
        manifest = read(out)
    except UserError:
        return f"it is not an export (it has no {MANIFEST} of ours)"
    if manifest.get("written_by") != MARK:
        return f"its {MANIFEST} lacks the mark of an export"
    ours = {MANIFEST, VERIFIED, BENCH, UNFINISHED, *manifest["files"]}
    others = sorted(
        str(file.relative_to(out))
        for file in out.rglob("*")
        if (not file.is_dir() or file.is_symlink()) and file.relative_to(out).as_posix() not in ours
    )
    return f"it also holds {', '.join(others[:3])}, which no export wrote" if others else ""


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing, cut short or changed since they were written, and weight files that were added."""
    faults = []
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        # the size first, since hashing reads the whole file
        elif (size := file.stat().st_size) != facts["bytes"]:
            faults.append(f"{name} has {size:,} bytes instead of {facts['bytes']:,}")
        elif sha256(file) != facts["sha256"]:
            faults.append(f"{name} was changed")
    kinds = ("*.safetensors", "*.bin", "*.onnx", "*.data", "*.gguf")
    weights = (file.name for kind in kinds for file in folder.glob(kind))
    added = set(weights) - set(manifest["files"])
    return faults + [f"{name} was added" for name in sorted(added)]


def store_verification(folder: Path, outcome: Mapping[str, object]) -> None:
    """Store the outcome of a verification in a separate file, which the manifest does not hash."""
    write_atomically(folder / VERIFIED, (json.dumps(finite(outcome), indent=1, default=str) + "\n").encode())
