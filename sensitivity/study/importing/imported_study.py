"""import_table(): makes a study from a CSV file of plans and their scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import disk_error, hidden_folder, new_folder
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.counting import count, numbers_of
from sensitivity.study.importing import columns
from sensitivity.study.importing.columns import Switches
from sensitivity.study.importing.components import component_map
from sensitivity.study.storage.paths import is_study
from sensitivity.study.study import Study
from sensitivity.study.trial import NATIVE


@dataclass(frozen=True)
class Imported:
    """A study made from a table, with the number of rows used and notes on the others."""

    study: Study
    rows: int
    used: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The result of the import as JSON values."""
        return {"study": str(self.study.path), "rows": self.rows, "used": self.used, "notes": list(self.notes)}


def import_table(
    path: Path | str,
    out: Path | str,
    scores: Sequence[str],
    *,
    parts: Mapping[str, str] | None = None,
    switches: Switches | None = None,
    numel: Mapping[str, int] | None = None,
    total: int | None = None,
    method: str = "codes",
    model: str | None = None,
) -> Imported:
    """Make a study from a CSV file of plans and their scores.

    scores: the columns to read as tasks. parts: column of bits -> component (vision, connector, language, or finer,
    such as vision.front.attn); 16 bits are native. numel: component or part -> its number of weights. total: number of
    weights of the whole model. method: the quantization method that all plans are said to use.
    """
    if (parts is None) == (switches is None):
        raise UserError(
            "say what the columns are: either --part COLUMN=COMPONENT or --switch COLUMN=COMPONENT --bits COLUMN"
        )
    table = columns.read_table(Path(path))
    if Path(out).exists():
        _check_free(Path(out))
    columns.check_tasks(table, scores)
    bits = columns.bits(table, parts) if parts is not None else columns.switched_bits(table, switches)
    bits, values, notes = _usable_rows(table, bits, scores, path)
    components = component_map(list(bits.columns), numel or {}, total, model or Path(path).stem)
    if not components.sized:
        notes.append("no sizes given (--numel): every component counts the same, bpw is their mean width")
    plans = [_plan(components, row, method) for _, row in bits.iterrows()]
    meta = {
        "model": components.model,
        "imported": Path(path).name,
        "rows": len(table),
        "used": len(bits),
        "left_out": notes,
        "columns": dict(parts or (switches.columns if switches else {})),
    }
    means = [dict(zip(scores, row, strict=True)) for row in values.to_numpy(dtype=float)]
    with _new_study_at(Path(out)) as unfinished:
        Study.create(unfinished, components, list(scores), meta).append(plans, means)
    return Imported(Study(out), len(table), len(bits), tuple(notes))


def _usable_rows(
    table: pd.DataFrame, bits: pd.DataFrame, scores: Sequence[str], path: Path | str
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The bits and scores of the rows that have all of them, checked, and notes on the others."""
    if taken := [name for name in scores if name in bits.columns]:
        raise UserError(f"a score cannot be called '{taken[0]}': that is a component; rename the column")
    values = pd.DataFrame({name: numbers_of(table, name) for name in scores})
    whole, notes = columns.complete_rows(bits, values)
    if not whole.any():
        raise UserError(f"no row of {path} has all bits and scores")
    columns.check_bits(bits[whole])
    columns.check_scores(values[whole])
    return bits[whole], values[whole], [*notes, *columns.remarks(bits[whole]), *columns.mixed_scales(values[whole])]


def _check_free(out: Path) -> None:
    """Raise an error unless the folder is empty: an imported study is never mixed with another."""
    if is_study(out):
        trials = count(len(Study(out).trials()), "trial")
        raise UserError(f"{out} already holds a study with {trials}; choose another --out")
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(f"{out} already exists and is not an empty folder; choose another --out")


@contextlib.contextmanager
def _new_study_at(out: Path) -> Iterator[Path]:
    """A hidden folder beside the target, renamed to it at the end: a killed import leaves no study of half a table."""
    try:
        with new_folder(out.parent), hidden_folder(out.with_name(out.name[:64])) as folder:
            yield folder / "study"
            Path(folder, "study").rename(out)  # `_check_free` found no folder there, or an empty one
    except OSError as error:
        raise disk_error(out, error) from error


def _plan(components: ComponentMap, row: pd.Series, method: str) -> Plan:
    """The plan of one row of the table."""
    schemes = ((name, int(row[name])) for name in components.names)
    return Plan(tuple((name, None if bits == NATIVE else Scheme(method, bits)) for name, bits in schemes))
