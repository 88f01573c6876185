"""Reads and checks the columns of an imported table: scores, and bits per component, given directly or by switches."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity.spec.components import KINDS
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.fields import quoted
from sensitivity.study.counting import count, numbers_of
from sensitivity.study.importing.components import check_names
from sensitivity.study.table import RESERVED
from sensitivity.study.trial import NATIVE

# suffixes of a task's columns in the study's own table
SCORE_SUFFIXES = ("nll", "se", "low", "high", "n", "repetitions", "delta", "delta.se", "delta.low", "delta.high")
LARGEST_SCORE = 1e9


@dataclass(frozen=True)
class Switches:
    """A table with a 0/1 column per component, one column of bits, and perhaps one of layer kinds.

    A component has the row's bits where its switch is 1, and is native where it is 0. kinds: a value of the kind
    column -> the kinds of layer that it means, such as {"BOTH": ("attn", "ff")}.
    """

    columns: Mapping[str, str]  # column -> component
    bits: str
    kind: str | None = None
    kinds: Mapping[str, Sequence[str]] | None = None


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file, or an error that says what is wrong with it."""
    if path.exists() and not path.is_file():  # reading a pipe could wait forever
        raise UserError(f"cannot read {path}: it is not a file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        if len(header) == 1 and (other := next((mark for mark in (";", "\t", "|") if mark in header[0]), None)):
            raise UserError(
                f"{path} separates its columns by {other!r}; save it with commas, and with points in its numbers"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # `numbers_of` reports text with its row
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row that is longer than the header
            table = pd.read_csv(path, encoding="utf-8-sig", index_col=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or 'it is not there'}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is not a table with commas and a header: it is not text in UTF-8") from error
    except (ValueError, csv.Error, pd.errors.ParserWarning) as error:
        raise UserError(
            f"{path} is not a table with commas and a header, in which each row has as many fields as the header"
        ) from error
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"the table has two columns named '{twice[0]}'; rename or delete one")
    if not len(table):
        raise UserError(f"{path} has a header but no rows")
    return table


def check_tasks(table: pd.DataFrame, scores: Sequence[str]) -> None:
    """Check that columns can be names of tasks: in the study's own table, in file names and in the report."""
    _check_present(table, [*scores])
    if not scores:
        raise UserError(f"name at least one column of scores (--score); there are {', '.join(table.columns)}")
    if twice := [name for name in scores if list(scores).count(name) > 1]:
        raise UserError(f"the score '{twice[0]}' is named twice; name each column once")
    taken = RESERVED | {f"{name}.{suffix}" for name in scores for suffix in SCORE_SUFFIXES}
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


def check_scores(scores: pd.DataFrame) -> None:
    """Raise an error for a score too large to be one."""
    for name, column in scores.items():
        if len(wrong := column[column.abs() > LARGEST_SCORE]):
            row = int(wrong.index[0]) + 1
            raise UserError(f"{name} is {wrong.iloc[0]:g} in row {row}; a score is at most {LARGEST_SCORE:,.0f}")


def mixed_scales(scores: pd.DataFrame) -> list[str]:
    """Notes on columns of scores in which some rows seem to be in percent and others fractions."""
    notes = []
    for name, column in scores.items():
        fractions, larger = column[(column > 0) & (column <= 1)], column[column > 1]
        if len(fractions) and len(larger) and 10 * fractions.max() < larger.min() <= 100 * fractions.max():
            notes.append(
                f"{name} is {fractions.max():g} in some rows and {larger.min():g} in others, as if fractions and "
                "percent were mixed; write all in one of them"
            )
    return notes


def _check_present(table: pd.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in table:
            raise unknown("column", column, table.columns)


def bits(table: pd.DataFrame, parts: Mapping[str, str]) -> pd.DataFrame:
    """Bits per component, from a column for each."""
    _check_present(table, list(parts))
    check_names(list(parts.values()))
    return pd.DataFrame({component: numbers_of(table, column) for column, component in parts.items()})


def switched_bits(table: pd.DataFrame, switches: Switches | None) -> pd.DataFrame:
    """Bits per component: the row's bits where its switch is 1 and its kind is meant, native elsewhere."""
    assert switches is not None
    _check_present(table, [*switches.columns, switches.bits, *([switches.kind] if switches.kind else [])])
    bits = numbers_of(table, switches.bits)
    by_component: dict[str, np.ndarray] = {}
    for column, component in switches.columns.items():
        on = numbers_of(table, column)
        if wrong := sorted(set(on[np.isfinite(on)]) - {0.0, 1.0}):
            raise UserError(f"a switch is 0 or 1, and column '{column}' holds {wrong[0]:g}")
        if switches.kind is None:
            by_component[component] = np.where(np.isnan(on), np.nan, np.where(on == 1, bits, NATIVE))
            continue
        for kind in _kinds(switches):
            meant = _means_kind(table, switches, kind)
            given = np.isfinite(on) & np.isfinite(meant)
            by_component[f"{component}.{kind}"] = np.where(
                given, np.where((on == 1) & (meant == 1), bits, NATIVE), np.nan
            )
    check_names(list(by_component))
    return pd.DataFrame(by_component)


def _kinds(switches: Switches) -> list[str]:
    """The kinds of layer that some value of the kind column means."""
    meanings = switches.kinds or {}
    return [kind for kind in KINDS if any(kind in kinds for kinds in meanings.values())]


def _means_kind(table: pd.DataFrame, switches: Switches, kind: str) -> np.ndarray:
    """For each row 1 where its kind column means this kind of layer, else 0; NaN where it is empty."""
    assert switches.kind is not None
    meanings = switches.kinds or {}
    column = table[switches.kind]
    if extra := sorted({str(value) for value in column.dropna()} - set(meanings)):
        raise UserError(f"'{switches.kind}' holds '{extra[0]}'; say what it means (--kinds {extra[0]}=attn,ff)")
    return np.array([np.nan if pd.isna(value) else float(kind in meanings[str(value)]) for value in column])


def complete_rows(bits: pd.DataFrame, scores: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Which rows have all bits and scores, and notes on those that do not."""
    no_bits = bits.isna().any(axis=1).to_numpy()
    no_score = ~np.isfinite(scores.to_numpy(dtype=float)).all(axis=1) & ~no_bits
    notes = []
    if no_bits.any():
        notes.append(f"{count(no_bits.sum(), 'row')} left out: bits are missing")
    if no_score.any():
        notes.append(f"{count(no_score.sum(), 'row')} left out: a score is missing or not finite")
    return ~(no_bits | no_score), notes


def check_bits(bits: pd.DataFrame) -> None:
    """Raise an error for bits that are not whole numbers from 1 to 16."""
    for name, column in bits.items():
        wrong = column[(column != column.round()) | (column < 1) | (column > NATIVE)]
        if len(wrong):
            raise UserError(
                f"{name} has {wrong.iloc[0]:g} bits in row {int(wrong.index[0]) + 1}; bits are whole numbers from 1 to "
                f"{NATIVE} ({NATIVE} means native)"
            )


def remarks(bits: pd.DataFrame) -> list[str]:
    """Notes on components that never change and on repeated plans."""
    constant = [str(name) for name, column in bits.items() if column.nunique() == 1]
    notes = [f"{name} has the same bits in every row: nothing can be said about it" for name in constant]
    repeated = int(bits.duplicated().sum())
    if repeated:
        notes.append(
            f"{count(repeated, 'row')} with the bits of an earlier one: a plan's score is the mean of its rows"
        )
    return notes
