"""Imports a table of bits and scores as a study: a column of bits per component, or switches and one such column."""

from __future__ import annotations

import contextlib
import csv
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sensitivity.spec.components import GRANULARITIES, GROUPS, KINDS, PARTS, ComponentMap, Kept, Weight, matches
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.fields import quoted
from sensitivity.spec.files import disk_error, new_folder
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.counting import count, numbers
from sensitivity.study.study import Study
from sensitivity.study.table import NATIVE

# names of components at every granularity but 'linear', where they are names of layers
COMPONENT = re.compile(
    rf"({'|'.join(PARTS)})(\.({'|'.join(GROUPS)}|other|projection))?(\.({'|'.join(KINDS)}))?"
    rf"|({'|'.join(PARTS)})\.\d{{1,4}}"
)
UNKNOWN = 1_000_000  # weights of each component if no sizes are given: all equal, so that bpw is the mean width
RESERVED = {"number", "key", "plan", "uniform", "native", "complete", "bytes", "bpw", "bpw_codes", "format", "seconds"}
RESERVED |= {"not_finite"}
ABOUT = ("nll", "se", "low", "high", "n", "delta", "delta.se", "delta.low", "delta.high")  # suffixes of columns
LARGEST_SCORE = 1e9
MOST_WEIGHTS = 10**15


@dataclass(frozen=True)
class Imported:
    """A study made from a table, with the number of rows used and notes on the others."""

    study: Study
    rows: int
    used: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result of the import as JSON values."""
        return {"study": str(self.study.path), "rows": self.rows, "used": self.used, "notes": list(self.notes)}


@dataclass(frozen=True)
class Switches:
    """The second form of a table: a 0/1 column per component, one column of bits, perhaps one of layer kinds.

    A component has the row's bits where its switch is 1, and is native where it is 0. kinds: a value of the kind
    column -> the kinds of layer that it means, such as {"BOTH": ("attn", "ff")}.
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
    """Make a study from a CSV file of plans and their scores.

    scores: the columns to read as tasks. parts: column of bits -> component (vision, connector, language, or finer,
    such as vision.front.attn); 16 bits are native. numel: component or part -> its number of weights. total: number of
    weights of the whole model. method: the quantization method that all plans are said to use.
    """
    if (parts is None) == (switches is None):
        raise UserError(
            "say what the columns are: either --part COLUMN=COMPONENT or --switch COLUMN=COMPONENT --bits COLUMN"
        )
    table = _read(Path(path))
    if Path(out).exists():
        _free(Path(out))
    _scores(table, scores)
    bits = _columns(table, parts) if parts is not None else _switched(table, switches)
    if taken := [name for name in scores if name in bits.columns]:
        raise UserError(f"a score cannot be called '{taken[0]}': that is a component; rename the column")
    values = pd.DataFrame({name: numbers(table, name) for name in scores})
    whole, notes = _complete(bits, values)
    if not whole.any():
        raise UserError(f"no row of {path} has all bits and scores")
    _check_bits(bits[whole])
    _check_scores(values[whole])
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
    rows = [dict(zip(scores, row, strict=True)) for row in values[whole].to_numpy(dtype=float)]
    with _aside(Path(out)) as unfinished:
        Study.create(unfinished, components, list(scores), meta).append(plans, rows)
    return Imported(Study(out), len(table), int(whole.sum()), tuple(notes))


def _free(out: Path) -> None:
    """Raise an error unless the folder is empty: an imported study is never mixed with another."""
    if (out / "journal.log").exists() or (out / "storage.url").exists():
        trials = count(len(Study(out).trials()), "trial")
        raise UserError(f"{out} already holds a study with {trials}; choose another --out")
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(f"{out} already exists and is not an empty folder; choose another --out")


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the target, renamed to it at the end: a killed import leaves no study of half a table."""
    try:
        with (
            new_folder(out.parent),
            tempfile.TemporaryDirectory(prefix=f".{out.name[:64]}.", dir=out.parent) as folder,
        ):
            yield Path(folder) / "study"
            Path(folder, "study").rename(out)  # `_free` found no folder there, or an empty one
    except OSError as error:
        raise disk_error(out, error) from error


def _scores(table: pd.DataFrame, scores: Sequence[str]) -> None:
    """Check that columns can be names of tasks: in the study's own table, in file names and in the report."""
    _known(table, [*scores])
    if not scores:
        raise UserError(f"name at least one column of scores (--score); there are {', '.join(table.columns)}")
    if twice := [name for name in scores if list(scores).count(name) > 1]:
        raise UserError(f"the score '{twice[0]}' is named twice; name each column once")
    taken = RESERVED | {f"{name}.{about}" for name in scores for about in ABOUT}
    if wrong := [name for name in scores if name in taken]:
        raise UserError(
            f"a score cannot be called '{wrong[0]}': the study's own table uses that name; rename the column"
        )
    for name in scores:
        if not name.strip() or len(name) > 100 or not name.isprintable() or set(name) & set("<>&\"'`|\\"):
            raise UserError(
                f"a score cannot be called {quoted(name)}: a name has 1 to 100 letters, and none of "
                "< > & \" ' ` | \\; rename the column"
            )


def _check_scores(scores: pd.DataFrame) -> None:
    """Raise an error for a score too large to be one."""
    for name, column in scores.items():
        if len(wrong := column[column.abs() > LARGEST_SCORE]):
            row = int(wrong.index[0]) + 1
            raise UserError(f"{name} is {wrong.iloc[0]:g} in row {row}; a score is at most {LARGEST_SCORE:,.0f}")


def _read(path: Path) -> pd.DataFrame:
    """A CSV file, or an error that says what is wrong with it."""
    if path.exists() and not path.is_file():  # reading a pipe could wait forever
        raise UserError(f"cannot read {path}: it is not a file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # `numbers` reports text with its row
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row that is longer than the header
            table = pd.read_csv(path, encoding="utf-8-sig", index_col=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or 'it is not there'}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is not a table with commas and a header: it is not text in UTF-8") from error
    except (ValueError, csv.Error, pd.errors.ParserWarning) as error:
        raise UserError(
            f"{path} is not a table with commas and a header, whose rows all have as many fields as that"
        ) from error
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
    """Bits per component: the row's bits where its switch is 1 and its kind is meant, native elsewhere."""
    assert switches is not None
    _known(table, [*switches.columns, switches.bits, *([switches.kind] if switches.kind else [])])
    bits = numbers(table, switches.bits)
    found: dict[str, np.ndarray] = {}
    for column, component in switches.columns.items():
        on = numbers(table, column)
        if wrong := sorted(set(on[np.isfinite(on)]) - {0.0, 1.0}):
            raise UserError(f"a switch is 0 or 1, and column '{column}' holds {wrong[0]:g}")
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
    """The kinds of layer that some value of the kind column means."""
    meanings = switches.kinds or {}
    return [kind for kind in KINDS if any(kind in kinds for kinds in meanings.values())]


def _meant(table: pd.DataFrame, switches: Switches, kind: str) -> np.ndarray:
    """For each row 1 where its kind column means this kind of layer, else 0; NaN where it is empty."""
    assert switches.kind is not None
    meanings = switches.kinds or {}
    column = table[switches.kind]
    if extra := sorted({str(value) for value in column.dropna()} - set(meanings)):
        raise UserError(f"'{switches.kind}' holds '{extra[0]}'; say what it means (--kinds {extra[0]}=attn,ff)")
    return np.array([np.nan if pd.isna(value) else float(kind in meanings[str(value)]) for value in column])


def _names(components: Sequence[str]) -> None:
    """Check that names are those of components, each once, and none inside another."""
    for component in components:
        if not COMPONENT.fullmatch(component):
            raise UserError(
                f"a component is named after its part of the model, {', '.join(PARTS)} (finer: vision.front.attn, with "
                f"{', '.join(GROUPS)} and {', '.join(KINDS)}; or a block, vision.03), not '{component}'"
            )
        if inside := [other for other in components if component.startswith(f"{other}.")]:
            raise UserError(
                f"'{component}' is a part of '{inside[0]}', which has bits of its own; name one or the other"
            )
    if twice := sorted({name for name in components if list(components).count(name) > 1}):
        raise UserError(f"two columns stand for '{twice[0]}'")


def _complete(bits: pd.DataFrame, scores: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Which rows have all bits and scores, and notes on those that do not."""
    lacking = bits.isna().any(axis=1).to_numpy()
    silent = ~np.isfinite(scores.to_numpy(dtype=float)).all(axis=1) & ~lacking
    notes = []
    if lacking.any():
        notes.append(f"{count(lacking.sum(), 'row')} left out: bits are missing")
    if silent.any():
        notes.append(f"{count(silent.sum(), 'row')} left out: a score is missing or not finite")
    return ~(lacking | silent), notes


def _check_bits(bits: pd.DataFrame) -> None:
    """Raise an error for bits that are no whole number from 1 to 16."""
    for name, column in bits.items():
        wrong = column[(column != column.round()) | (column < 1) | (column > NATIVE)]
        if len(wrong):
            raise UserError(
                f"{name} has {wrong.iloc[0]:g} bits in row {int(wrong.index[0]) + 1}; bits are whole numbers from 1 to "
                f"{NATIVE} ({NATIVE} means native)"
            )


def _remarks(bits: pd.DataFrame) -> list[str]:
    """Notes on components that never change and on repeated plans."""
    constant = [str(name) for name, column in bits.items() if column.nunique() == 1]
    notes = [f"{name} has the same bits in every row: nothing can be said about it" for name in constant]
    repeated = int(bits.duplicated().sum())
    if repeated:
        notes.append(f"{count(repeated, 'row')} repeat the bits of an earlier one: kept as replicates")
    return notes


def _map(names: Sequence[str], numel: Mapping[str, int], total: int | None, model: str) -> ComponentMap:
    """The components of the table, at the first granularity that has these names; weights beyond them are kept."""
    if wrong := [n for n in (*numel.values(), *([] if total is None else [total])) if not 0 < n <= MOST_WEIGHTS]:
        raise UserError(f"a number of weights is from 1 to {MOST_WEIGHTS:,}, not {wrong[0]:,}")
    sizes = _sizes(names, numel)
    weights = tuple(_weight(name, sizes[name]) for name in names)
    rest = 0 if total is None else total - sum(sizes.values())
    if rest < 0:
        raise UserError(f"the components have {sum(sizes.values()):,} weights, more than the whole model's {total:,}")
    kept = (Kept("rest", rest, "not in the table"),) if rest else ()
    fitting = [by for by in GRANULARITIES if all(weight.place(by) == weight.module for weight in weights)]
    return ComponentMap(model, fitting[0], weights, kept)


def _sizes(names: Sequence[str], numel: Mapping[str, int]) -> dict[str, int]:
    """Weights per component: as given, or an even share of what was given for the part in which it lies."""
    sizes: dict[str, int] = {}
    # the finest name first: a part then divides among its other components what remains
    for pattern, weights in sorted(numel.items(), key=lambda item: -len(item[0])):
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
    """A weight that stands for a whole component; group and kind are read from its name, for coarser granularities."""
    part, *words = name.split(".")
    group = words.pop(0) if words and words[0] in GROUPS else None
    kind = words.pop(0) if words and words[0] in KINDS else None
    block = None if group is None or words else GROUPS.index(group)
    if block is None:
        kind = None
    return Weight(f"{name}.weight", 1, numel, part, block, 0 if block is None else len(GROUPS), kind)


def _plan(components: ComponentMap, row: pd.Series, method: str) -> Plan:
    """The plan of one row of the table."""
    schemes = ((name, int(row[name])) for name in components.names)
    return Plan(tuple((name, None if bits == NATIVE else Scheme(method, bits)) for name, bits in schemes))
