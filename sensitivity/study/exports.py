"""Exports of a study: writes a note on each into the study's folder, and reads the notes for the report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from sensitivity.spec import schema
from sensitivity.spec.errors import shell_word
from sensitivity.spec.files import finite, write_atomically
from sensitivity.spec.plan_file import EXPORTED
from sensitivity.study.storage import paths

MANIFEST = EXPORTED
VERIFIED = "verified.json"  # in an export: the result of its verification
NAME_LENGTH = 16  # hexadecimal digits of a note's name
BENCH = "bench.json"  # in an export: its measured time and memory, and those of full precision


def write_note(study: Path, out: Path, facts: Mapping[str, object]) -> None:
    """Write a note on an export, named after its folder: a later export to the same folder replaces the note."""
    folder = str(out.resolve())
    notes = paths.export_notes_folder(study)
    notes.mkdir(exist_ok=True)
    target = notes / f"{hashlib.sha256(folder.encode()).hexdigest()[:NAME_LENGTH]}.json"
    content = {"folder": folder, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
    write_atomically(target, (json.dumps(finite(content), indent=1) + "\n").encode())


def notes_of(study: Path) -> list[dict[str, object]]:
    """All exports of a study by their notes, oldest first, each with its `state`: verified, not verified, or gone."""
    files = sorted(paths.export_notes_folder(study).glob(f"{'[0-9a-f]' * NAME_LENGTH}.json"))  # others are not ours
    notes = [schema.read(file, "export", "delete it; the export itself is not touched") for file in files]
    notes.sort(key=lambda note: str(note["time"]))
    return [{"path_gain": None, **note, "state": _state(Path(note["folder"]))} for note in notes]


def _state(folder: Path) -> str:
    """Whether an export is still there, and the verdict of its verification."""
    try:
        if not (folder / MANIFEST).exists():
            return "no longer there"
        if not (folder / VERIFIED).exists():
            return "not verified"
    except (OSError, ValueError):  # the note's folder has a name that this system does not allow
        return "no longer there"
    remedy = f"`sensitivity verify {shell_word(folder)}` writes it anew"
    return str(schema.read(folder / VERIFIED, "verified", remedy)["verdict"])


def path_gain_sentences(gain: Mapping[str, object]) -> str:
    """Sentences on how calibrating on another path changed the scores, with paired differences."""
    differences = {task: difference for task, difference in gain.items() if isinstance(difference, dict)}
    tasks = []
    for task, difference in differences.items():
        tasks.append(f"{task} {_interval(difference, '+')}, n = {difference['n']}")
        if scores := difference.get("scores"):
            tasks[-1] += f", {_interval(scores['ours'])} instead of {_interval(scores['theirs'])}"
        if likelihood := difference.get("log_likelihood"):
            tasks[-1] += f" (log-likelihood of right answers {_interval(likelihood, '+')})"
    words = (
        f"Calibrated again on the {gain['path']} path. Against the path on which the plan was chosen, paired on the "
        f"same examples: {'; '.join(tasks)}."
    )
    if differences and all(difference["mean"] <= 0 for difference in differences.values()):
        words += " No score rose: without --path the plan is exported as it was chosen."
    return words


def _interval(score: Mapping[str, float | None], sign: str = "") -> str:
    """A mean and its interval; a dash stands for an end that is infinite."""
    low, high = ("–" if score[end] is None else f"{score[end]:{sign}.4f}" for end in ("low", "high"))
    return f"{score['mean']:{sign}.4f} [{low}, {high}]"
