"""Expected damages: how much each scheme was thought to cost each component before a study measured any plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sensitivity.spec import schema
from sensitivity.spec.errors import shell_word
from sensitivity.spec.files import check_may_replace, discard, write_atomically
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage import paths

REPAIR = "delete it, and plans are predicted from what was measured alone"
Expected = Mapping[str, Mapping[Scheme, float]]  # component -> scheme -> damage; only ratios count


def save(study: Path, expected: Expected, source: str) -> Path:
    """Write the expected damages beside a study's trials."""
    damages = [
        {"component": name, "scheme": one.to_json(), "damage": damage}
        for name, schemes in expected.items()
        for one, damage in schemes.items()
    ]
    file = paths.expected_file(study)
    check_may_replace(file, lambda there: schema.why_foreign(there, "expected"))
    write_atomically(file, json.dumps({"version": 1, "from": source, "damages": damages}, indent=1).encode())
    return file


def forget(study: Path) -> None:
    """Expect nothing any more; a file of another origin stays, with an error."""
    file = paths.expected_file(study)
    check_may_replace(file, lambda there: schema.why_foreign(there, "expected"))
    discard(file, ours=True)


def read(study: Path) -> Expected | None:
    """The damages that a study expected; None where it expected none."""
    file = paths.expected_file(study)
    if not file.exists():
        return None
    damages: dict[str, dict[Scheme, float]] = {}
    for row in schema.read(file, "expected", REPAIR)["damages"]:
        damages.setdefault(row["component"], {})[Scheme.from_json(row["scheme"])] = float(row["damage"])
    return damages


def note_on(study: Path) -> str:
    """What the predictions of a study start from, and how to leave it out; an empty string where it expects nothing."""
    if (origin := origin_of(study)) is None:
        return ""
    return (
        f"predictions start from what {origin} let expect of each component, as far as no score disagrees; "
        f"`sensitivity recommend {shell_word(study)} --prior none` leaves that out from then on"
    )


def origin_of(study: Path) -> str | None:
    """What a study's expectation was computed from; None where it has none."""
    file = paths.expected_file(study)
    return str(schema.read(file, "expected", REPAIR)["from"]) if file.exists() else None
