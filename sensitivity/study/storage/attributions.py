"""Reads the scores of components that `sensitivity explain` stored in a folder."""

from __future__ import annotations

from pathlib import Path

from sensitivity.spec import schema
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage import paths

REPAIR = "compute it again with `sensitivity explain`"


def read(folder: Path, score: str, fingerprint: str | None = None) -> dict[str, dict[Scheme, float]]:
    """The scores of this name, of each component at each scheme; empty where the folder has none.

    With the fingerprint of a model, an error where they are known to be of another one.
    """
    file = paths.attributions_file(folder)
    if not file.exists():
        return {}
    found: dict[str, dict[Scheme, float]] = {}
    content = schema.read(file, "attributions", REPAIR)
    if fingerprint is not None and content.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(f"{file} is about another model than the study beside it; {REPAIR}")
    for row in content["scores"].get(score, {"values": ()})["values"]:
        if row["score"] is not None:  # null: not finite
            found.setdefault(row["component"], {})[Scheme.from_json(row["scheme"])] = float(row["score"])
    return found


def schemes(folder: Path) -> list[Scheme]:
    """The distinct schemes that the scores in a folder are about; none where it has no scores."""
    file = paths.attributions_file(folder)
    scores = schema.read(file, "attributions", REPAIR)["scores"] if file.exists() else {}
    return list(dict.fromkeys(Scheme.from_json(row["scheme"]) for one in scores.values() for row in one["values"]))
