"""What was exported from a study: a note in the study's folder for each export, and what its report says of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensitivity.spec import schema
from sensitivity.spec.files import finite, write_whole

NOTES = "exports"  # in a study's folder
MANIFEST = "sensitivity.json"  # in an export: what was written
VERIFIED = "verified.json"  # and what its verification found


def note(study: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Remember an export by where it lies: a later one to the same place takes its note over."""
    folder = str(out.resolve())
    (study / NOTES).mkdir(exist_ok=True)
    target = study / NOTES / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}.json"
    content = {"folder": folder, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
    write_whole(target, (json.dumps(finite(content), indent=1) + "\n").encode())


def noted(study: Path) -> list[dict[str, Any]]:
    """The exports of a study that were noted, oldest first, each with its `state`: verified or not, or gone."""
    files = sorted((study / NOTES).glob("*.json"))
    found = [schema.read(file, "export", "delete it; the export itself is not touched") for file in files]
    return [{"path_gain": None, **one, "state": _state(one)} for one in sorted(found, key=lambda one: str(one["time"]))]


def _state(one: Mapping[str, Any]) -> str:
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
    """What calibrating again on another path changed, as a sentence: a measured, paired difference."""
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
