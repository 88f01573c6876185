"""Reads table columns as numbers, and writes counts with their noun."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from sensitivity.spec.errors import UserError

Floats = np.ndarray


def numbers_of(table: pd.DataFrame, column: str) -> Floats:
    """A column as numbers, NaN where it is empty; raises an error that names the row if it holds text."""
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = values.isna() & table[column].notna()
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        more = f" (and {int(wrong.sum()) - 1} more)" if wrong.sum() > 1 else ""
        text = str(table[column].iloc[row])
        raise UserError(f"column '{column}' holds '{text}' in row {row + 1}{more}, not a number{_how_to_write(text)}")
    return np.asarray(values.to_numpy(dtype=float))


def _how_to_write(text: str) -> str:
    """What to write instead of a percent sign or a decimal comma; nothing for other text."""
    plain = text.replace(",", ".").removesuffix("%").strip()
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?", plain) or plain == text:
        return ""
    return f"; write {plain}, {'in percent in all rows' if text.endswith('%') else 'with a decimal point'}"


def count(number: int | np.integer, what: str) -> str:
    """A number with its noun, as in '1 trial' and '3 trials'."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
