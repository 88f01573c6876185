"""Exports of a study: a note in its folder for each of them, and their state and sentences for the report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensitivity.spec import schema
from sensitivity.spec.files import finite, write_atomically

NOTES = "exports"  # folder of the notes, in a study's folder
MANIFEST = "sensitivity.json"  # in an export: which files were written
VERIFIED = "verified.json"  # in an export: the result of its verification


def note(study: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Write a note on an export, named after its folder: a later export to the same folder replaces the note."""
    folder = str(out.resolve())
    (study / NOTES).mkdir(exist_ok=True)
    target = study / NOTES / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}.json"
    content = {"folder": folder, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
    write_atomically(target, (json.dumps(finite(content), indent=1) + "\n").encode())


def noted(study: Path) -> list[dict[str, Any]]:
    """All exports of a study by their notes, oldest first, each with its `state`: verified, not verified, or gone."""
    files = sorted((study / NOTES).glob("*.json"))
    found = [schema.read(file, "export", "delete it; the export itself is not touched") for file in files]
    return [{"path_gain": None, **one, "state": _state(one)} for one in sorted(found, key=lambda one: str(one["time"]))]


def _state(one: Mapping[str, Any]) -> str:
    """Whether an export is still there, and the verdict of its verification."""
    folder = Path(one["folder"])
    try:
        if not (folder / MANIFEST).exists():
            return "no longer there"
        if not (folder / VERIFIED).exists():
            return "not verified"
    except (OSError, ValueError):  # a name that no file can have
        return "no longer there"
    return str(schema.read(folder / VERIFIED, "verified", f"`sensitivity verify {folder}` writes it anew")["verdict"])


def path_gain(gain: Mapping[str, Any]) -> str:
    """What calibrating on another path changed in the scores, as sentences with paired differences."""
    tasks = []
    for task, found in gain.items():
        if task != "path":
            tasks.append(f"{task} {_interval(found)}, n = {found['n']}")
            if scores := found.get("scores"):
                tasks[-1] += f", {_score(scores['ours'])} instead of {_score(scores['theirs'])}"
            if likely := found.get("log_likelihood"):
                tasks[-1] += f" (log-likelihood of right answers {_interval(likely)})"
    words = (
        f"Calibrated again on the {gain['path']} path. Against the path on which the plan was chosen, paired on the "
        f"same examples: {'; '.join(tasks)}."
    )
    if all(found["mean"] <= 0 for task, found in gain.items() if task != "path"):
        words += " No score rose: without --path the plan is exported as it was chosen."
    return words


def _interval(found: Mapping[str, Any]) -> str:
    low, high = ("–" if found[end] is None else f"{found[end]:+.4f}" for end in ("low", "high"))
    return f"{found['mean']:+.4f} [{low}, {high}]"


def _score(found: Mapping[str, Any]) -> str:
    low, high = ("–" if found[end] is None else f"{found[end]:.4f}" for end in ("low", "high"))
    return f"{found['mean']:.4f} [{low}, {high}]"
