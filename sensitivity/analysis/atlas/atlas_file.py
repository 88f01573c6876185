"""The atlas as a file: a Parquet table of damages, with what each study is about as JSON in its metadata."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sensitivity.analysis.atlas.entry import Entry, entries_of
from sensitivity.spec import schema
from sensitivity.spec.errors import Notice, UserError, check_is, reason, shell_word
from sensitivity.spec.files import disk_error, new_folder, replacing
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage.process_lock import ProcessLock, held
from sensitivity.study.study import Study

KEY = b"sensitivity-atlas"  # of the metadata, which marks a file as ours
COLUMNS = ("study", "component", "numel", "scheme", "damage", "error")
ENTRY_FIELDS = ("about", "parameters", "plans", "full", "floor", "power", "noise")  # of each study, in the JSON
DEFAULT = Path("runs/atlas.parquet")
REMEDY = "restore a copy, or name another file"


def add_to_atlas(study: Study, to: Path | str = DEFAULT) -> list[Entry]:
    """Add what a study measured to an atlas, and return all entries.

    Of two studies about the same, that with more plans stays, so that their order does not matter; a study that is
    added again replaces itself. The file holds no weights, images, questions or paths.

    Examples:
        >>> from sensitivity import add_to_atlas
        >>> [entry.about["task"] for entry in add_to_atlas(Study("runs/vqa"), "runs/atlas.parquet")]
        ['vqa']
    """
    check_is("study", study, Study)
    file = Path(to)
    if file.suffix != DEFAULT.suffix:
        raise UserError(f"an atlas is a file such as {DEFAULT}, not {file}")
    fresh = entries_of(study)
    if file.exists():
        read(file)  # refuses another file before a lock is made beside it
    lock = file.with_suffix(".kernel-lock").name
    with new_folder(file.parent, [lock]), held(ProcessLock(file)):  # else one of two processes could lose its study
        others = read(file) if file.exists() else []
        kept = {_about(one): one for one in others}
        for one in fresh:
            kept[_about(one)] = _of_more_plans(one, kept.get(_about(one)))
        entries = [kept[about] for about in sorted(kept)]
        _write(file, entries)
    return entries


def _of_more_plans(fresh: Entry, known: Entry | None) -> Entry:
    """The entry that stays of two about the same: that from more plans, the fresh one if both have as many."""
    if known is not None and known.plans != fresh.plans:
        what = f"stays: it has {known.plans} plans, and this one {fresh.plans}"
        if fresh.plans > known.plans:
            what = f"gives way: it had {known.plans} plans, and this one has {fresh.plans}"
        same = "of the same model, task, components, methods, n and seed"
        warnings.warn(f"in the atlas, an earlier study {same} {what}", Notice, stacklevel=3)
    return fresh if known is None or fresh.plans >= known.plans else known


def read(file: Path) -> list[Entry]:
    """The entries of an atlas."""
    import pyarrow as pa
    from pyarrow import parquet

    if not file.exists():
        raise UserError(f"no atlas at {file}; `sensitivity atlas add STUDY --to {shell_word(file)}` makes one")
    if file.is_dir():
        raise UserError(f"{file} is no atlas, but a folder; name a file such as {DEFAULT}")
    what = f"{file} cannot be used"
    try:
        found = parquet.read_table(file)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{file} is no atlas, or was cut short ({reason(error)}); {REMEDY}") from error
    except OSError as error:
        raise disk_error(file, error) from error
    about = (found.schema.metadata or {}).get(KEY)
    if about is None or tuple(found.column_names) != COLUMNS:
        raise UserError(f"{file} is no atlas, but another table; {REMEDY}")
    return [_entry(one) for one in _checked(about, found.to_pylist(), what)["studies"]]


def _checked(about: bytes, table: Sequence[Mapping[str, Any]], what: str) -> Any:
    """The JSON of a file with each row of the table where it belongs, checked against the schema of an atlas."""
    try:
        content = json.loads(about)
        rows = [{**row, "scheme": json.loads(row["scheme"])} for row in table]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{what}: its JSON is damaged ({reason(error)}); {REMEDY}") from error
    studies = content.get("studies") if isinstance(content, dict) else None
    if isinstance(studies, list):  # else the schema says what is wrong
        for number, one in enumerate(studies):
            if isinstance(one, dict):
                one["damages"] = [row for row in rows if row["study"] == number]
    schema.check(content, "atlas", what, REMEDY)
    return content


def _entry(one: Mapping[str, Any]) -> Entry:
    """An entry from its JSON and its rows."""
    sizes: dict[str, int] = {}
    damages: dict[str, dict[Scheme, float]] = {}
    errors: dict[str, dict[Scheme, float]] = {}
    for row in one["damages"]:
        name, scheme = row["component"], Scheme.from_json(row["scheme"])
        sizes[name] = row["numel"]
        damages.setdefault(name, {})[scheme] = row["damage"]
        if row["error"] is not None:
            errors.setdefault(name, {})[scheme] = row["error"]
    return Entry(**{name: one[name] for name in ENTRY_FIELDS}, sizes=sizes, damages=damages, errors=errors)


def _write(file: Path, entries: Sequence[Entry]) -> None:
    """Replace an atlas by one with these entries."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        (number, name, entry.sizes[name], json.dumps(scheme.to_json()), damage, entry.errors.get(name, {}).get(scheme))
        for number, entry in enumerate(entries)
        for name, row in entry.damages.items()
        for scheme, damage in row.items()
    ]
    kinds = (pa.int32(), pa.string(), pa.int64(), pa.string(), pa.float64(), pa.float64())
    columns = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    content = {"version": 1, "studies": [{name: getattr(entry, name) for name in ENTRY_FIELDS} for entry in entries]}
    table = pa.table(dict(zip(COLUMNS, columns, strict=True))).replace_schema_metadata({KEY: json.dumps(content)})
    with replacing(file) as unfinished:
        parquet.write_table(table, unfinished)


def _about(entry: Entry) -> str:
    """What an entry is about, to compare and to sort by."""
    return json.dumps(entry.about, sort_keys=True)
