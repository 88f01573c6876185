"""Any table of bits and scores becomes a study: one column per component, or switches and one column of bits."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sensitivity.components import GRANULARITIES, GROUPS, KINDS, PARTS, ComponentMap, Kept, Weight, matches
from sensitivity.errors import UserError, unknown
from sensitivity.plan import Plan, Scheme
from sensitivity.readings import count, numbers
from sensitivity.trials import NATIVE, Study

UNKNOWN = 1_000_000  # weights of a component whose size nobody gave: all the same, so bpw is a plain mean
RESERVED = {"number", "key", "plan", "uniform", "native", "bytes", "bpw", "bpw_codes", "seconds"}


@dataclass(frozen=True)
class Imported:
    """A study made from a table, and what became of its rows."""

    study: Study
    rows: int
    used: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"study": str(self.study.path), "rows": self.rows, "used": self.used, "notes": list(self.notes)}


@dataclass(frozen=True)
class Switches:
    """The second form: columns that switch components on, one column of bits, perhaps one that says which kind.

    kinds: what the kind column may say -> the kinds of layer it means, e.g. {"BOTH": ("attn", "ff")}.
    """

    columns: Mapping[str, str]  # column -> component
    bits: str
    kind: str | None = None
    kinds: Mapping[str, Sequence[str]] | None = None


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
    """Make a study from a CSV file.

    parts: column of bits -> component (vision, connector, language, or finer: vision.front.attn); 16 bits are native.
    scores: columns to read as tasks. numel: component or part -> weights; total: weights of the whole model.
    """
    if (parts is None) == (switches is None):
        raise UserError(
            "say what the columns are: either --part COLUMN=COMPONENT or --switch COLUMN=COMPONENT --bits COLUMN"
        )
    table = _read(Path(path))
    _known(table, [*scores])
    if not scores:
        raise UserError(f"name at least one column of scores (--score); there are {', '.join(table.columns)}")
    if taken := RESERVED & set(scores):
        raise UserError(
            f"a score cannot be called '{taken.pop()}': the study's own table uses that name; rename the column"
        )
    bits = _columns(table, parts) if parts is not None else _switched(table, switches)
    values = pd.DataFrame({name: numbers(table, name) for name in scores})
    whole, notes = _complete(bits, values)
    if not whole.any():
        raise UserError(f"no row of {path} has all bits and scores")
    _check_bits(bits[whole])
    notes += _remarks(bits[whole])
    components = _map(list(bits.columns), numel or {}, total, model or Path(path).stem)
    if components.numel == sum(w.numel for w in components.weights) and not numel:
        notes.append("no sizes given (--numel): every component counts the same, bpw is their mean width")
    plans = [_plan(components, row, method) for _, row in bits[whole].iterrows()]
    meta = {
        "model": components.model,
        "imported": Path(path).name,
        "rows": len(table),
        "used": int(whole.sum()),
        "left_out": notes,
        "columns": dict(parts or (switches.columns if switches else {})),
    }
    study = Study.create(out, components, list(scores), meta)
    if study.trials():
        raise UserError(f"{out} already holds a study with {count(len(study.trials()), 'trial')}; choose another --out")
    study.append(plans, [dict(zip(scores, row, strict=True)) for row in values[whole].to_numpy(dtype=float)])
    return Imported(study, len(table), int(whole.sum()), tuple(notes))


def _read(path: Path) -> pd.DataFrame:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        table = pd.read_csv(path, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a table with commas and a header: {str(error).splitlines()[0]}") from error
    if len(header) == 1 and (other := next((mark for mark in (";", "\t", "|") if mark in header[0]), None)):
        raise UserError(f"{path} separates its columns by {other!r}; save it with commas")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"the table has two columns named '{twice[0]}'; rename or delete one")
    if not len(table):
        raise UserError(f"{path} has a header but no rows")
    return table


def _known(table: pd.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in table:
            raise unknown("column", column, table.columns)


def _columns(table: pd.DataFrame, parts: Mapping[str, str]) -> pd.DataFrame:
    _known(table, list(parts))
    _names(list(parts.values()))
    return pd.DataFrame({component: numbers(table, column) for column, component in parts.items()})


def _switched(table: pd.DataFrame, switches: Switches | None) -> pd.DataFrame:
    """Bits per component: those of the row where its switch is on (and its kind meant), native elsewhere."""
    assert switches is not None
    _known(table, [*switches.columns, switches.bits, *([switches.kind] if switches.kind else [])])
    bits = numbers(table, switches.bits)
    found: dict[str, np.ndarray] = {}
    for column, component in switches.columns.items():
        on = numbers(table, column)
        if wrong := sorted(set(on[np.isfinite(on)]) - {0.0, 1.0}):
            raise UserError(f"'{column}' is to be a switch, 0 or 1, but holds {wrong[0]:g}")
        if switches.kind is None:
            found[component] = np.where(np.isnan(on), np.nan, np.where(on == 1, bits, NATIVE))
            continue
        for kind in _kinds(switches):
            meant = _meant(table, switches, kind)
            known = np.isfinite(on) & np.isfinite(meant)
            found[f"{component}.{kind}"] = np.where(known, np.where((on == 1) & (meant == 1), bits, NATIVE), np.nan)
    _names(list(found))
    return pd.DataFrame(found)


def _kinds(switches: Switches) -> list[str]:
    meanings = switches.kinds or {}
    return [kind for kind in KINDS if any(kind in kinds for kinds in meanings.values())]


def _meant(table: pd.DataFrame, switches: Switches, kind: str) -> np.ndarray:
    assert switches.kind is not None
    meanings = switches.kinds or {}
    column = table[switches.kind]
    if extra := sorted({str(value) for value in column.dropna()} - set(meanings)):
        raise UserError(f"'{switches.kind}' holds '{extra[0]}'; say what it means (--kind {extra[0]}=attn,ff)")
    return np.array([np.nan if pd.isna(value) else float(kind in meanings[str(value)]) for value in column])


def _names(components: Sequence[str]) -> None:
    for component in components:
        if component.split(".")[0] not in PARTS:
            raise UserError(
                f"a component is named after its part of the model, {', '.join(PARTS)} (finer: vision.front.attn), "
                f"not '{component}'"
            )
    if twice := sorted({name for name in components if list(components).count(name) > 1}):
        raise UserError(f"two columns are both said to be '{twice[0]}'")


def _complete(bits: pd.DataFrame, scores: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    lacking = bits.isna().any(axis=1).to_numpy()
    silent = ~np.isfinite(scores.to_numpy(dtype=float)).all(axis=1) & ~lacking
    notes = []
    if lacking.any():
        notes.append(f"{count(lacking.sum(), 'row')} left out: bits are missing")
    if silent.any():
        notes.append(f"{count(silent.sum(), 'row')} left out: a score is missing or not finite")
    return ~(lacking | silent), notes


def _check_bits(bits: pd.DataFrame) -> None:
    for name, column in bits.items():
        wrong = column[(column != column.round()) | (column < 1) | (column > NATIVE)]
        if len(wrong):
            raise UserError(
                f"{name} has {wrong.iloc[0]:g} bits in row {int(wrong.index[0]) + 1}; bits are whole numbers from 1 to "
                f"{NATIVE} ({NATIVE} means native)"
            )


def _remarks(bits: pd.DataFrame) -> list[str]:
    constant = [str(name) for name, column in bits.items() if column.nunique() == 1]
    notes = [f"{name} has the same bits in every row: nothing can be said about it" for name in constant]
    repeated = int(bits.duplicated().sum())
    if repeated:
        notes.append(f"{count(repeated, 'row')} repeat the bits of an earlier one: kept as replicates")
    return notes


def _map(names: Sequence[str], numel: Mapping[str, int], total: int | None, model: str) -> ComponentMap:
    sizes = _sizes(names, numel)
    weights = tuple(_weight(name, sizes[name]) for name in names)
    rest = 0 if total is None else total - sum(sizes.values())
    if rest < 0:
        raise UserError(f"the components have {sum(sizes.values()):,} weights, more than the whole model's {total:,}")
    kept = (Kept("rest", rest, "not in the table"),) if rest else ()
    fitting = [by for by in GRANULARITIES if all(weight.place(by) == weight.module for weight in weights)]
    return ComponentMap(model, fitting[0], weights, kept)


def _sizes(names: Sequence[str], numel: Mapping[str, int]) -> dict[str, int]:
    """Sizes given for a name, or for the part it lies in, which its components then share evenly."""
    sizes: dict[str, int] = {}
    for pattern, weights in sorted(numel.items(), key=lambda item: -len(item[0])):  # the finest first
        members = [name for name in names if matches(name, pattern)]
        if not members:
            raise unknown("component in --numel", pattern, names)
        open_ = [name for name in members if name not in sizes]
        left = weights - sum(sizes[name] for name in members if name in sizes)
        if left < len(open_) or weights < 1:
            raise UserError(f"{pattern} cannot have {weights:,} weights")
        sizes |= {name: left // len(open_) + (i < left % len(open_)) for i, name in enumerate(open_)}
    if sizes and (without := [name for name in names if name not in sizes]):
        raise UserError(f"no size given for {', '.join(without)}; give all or none (--numel {without[0]}=...)")
    return sizes or dict.fromkeys(names, UNKNOWN)


def _weight(name: str, numel: int) -> Weight:
    """One row of weights; thirds and kinds in the name are understood, so that a coarser view is possible."""
    part, *words = name.split(".")
    group = words.pop(0) if words and words[0] in GROUPS else None
    kind = words.pop(0) if words and words[0] in KINDS else None
    block = None if group is None or words else GROUPS.index(group)
    if block is None:
        kind = None
    return Weight(f"{name}.weight", 1, numel, part, block, 0 if block is None else len(GROUPS), kind)


def _plan(components: ComponentMap, row: pd.Series, method: str) -> Plan:
    schemes = ((name, int(row[name])) for name in components.names)
    return Plan(tuple((name, None if bits == NATIVE else Scheme(method, bits)) for name, bits in schemes))
