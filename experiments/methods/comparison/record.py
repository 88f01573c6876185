"""The committed record of the comparison: of every measured cell, which examples were answered right."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from experiments.methods.comparison.rows import HOSTS, ROWS, Cell, scheme_of
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import overwrite

NATIVE, NOWHERE = "full precision", "none"
COLUMNS = ("model", "row", "bits", "where", "scheme", "stored", "task", "calibration", "n", "score", "right")


@dataclass(frozen=True)
class Measured:
    """The stored bits per weight of a cell's part, and per task a 0 or 1 for each example."""

    stored: float
    right: Mapping[str, np.ndarray]


Record = dict[Cell, Measured]


def native(model: str) -> Cell:
    """The cell of full precision."""
    return Cell(model, NATIVE, 16, NOWHERE)


@cache
def settings_mark(row: str, bits: int) -> str:
    """Eight letters that change with the settings of a row: a cell with other ones is measured again."""
    if row == NATIVE:
        return ""
    return hashlib.sha256(repr(scheme_of(row, bits)).encode()).hexdigest()[:8]


def read(path: Path, n: int, calibration: int) -> Record:
    """The measured cells whose rows still have the settings that they were measured with."""
    lines = list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []
    found: Record = {}
    for line in lines:
        if (int(line["n"]), int(line["calibration"])) != (n, calibration):
            raise UserError(
                f"{path} was measured with --n {line['n']} --examples {line['calibration']}; use these, or name "
                "another file with --record"
            )
        cell = Cell(line["model"], line["row"], int(line["bits"]), line["where"])
        if cell.row not in (*ROWS, *HOSTS, NATIVE) or line["scheme"] != settings_mark(cell.row, cell.bits):
            continue
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(line["right"]), np.uint8))[:n]
        before = found.get(cell, Measured(float(line["stored"]), {}))
        found[cell] = Measured(before.stored, {**before.right, line["task"]: bits.astype(float)})
    return found


def write(path: Path, record: Record, calibration: int) -> None:
    """Replace the record, sorted, so that a new cell is a new line and changes no other."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for cell, one in sorted(record.items()):
        for task, right in sorted(one.right.items()):
            assert set(np.unique(right)) <= {0.0, 1.0}, f"{task} has scores between 0 and 1, which a bit does not hold"
            packed = np.packbits(right.astype(np.uint8)).tobytes().hex()
            mark = settings_mark(cell.row, cell.bits)
            head = (cell.model, cell.row, cell.bits, cell.where, mark, f"{one.stored:.4f}", task)
            lines.writerow((*head, calibration, len(right), f"{right.mean():.4f}", packed))
    path.parent.mkdir(parents=True, exist_ok=True)
    overwrite(path, text.getvalue())
