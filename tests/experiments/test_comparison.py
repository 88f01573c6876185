"""The comparison of methods: all its cells are there, its record is read as written, its page says what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.methods.comparison import page, record
from experiments.methods.comparison.record import Measured, Record
from experiments.methods.comparison.rows import (
    ADDS_TO,
    BOTH,
    EXTRA,
    HOSTS,
    MODELS,
    PRUNED,
    ROUNDED,
    ROWS,
    TURNS,
    WEIGHTS,
    WHERE,
    WIDTHS,
    Cell,
    cells,
    kind,
    scheme_of,
    with_hosts,
)
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.presets import PRESETS
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task

MODEL = MODELS[0]


@pytest.fixture(scope="module")
def vqa() -> Task:
    return task("vqa", n=100)


def planted(vqa: Task, **shares: float) -> Record:
    """Full precision right everywhere, and rows at 2 bits on all parts right on a share of the examples."""
    of = Cell(MODEL, "rtn", 2, "all")
    n = len(vqa.examples)
    found: Record = {record.native(MODEL): Measured(16.0, {"vqa": np.ones(n)})}
    for row, share in shares.items():
        right = (np.random.default_rng(len(row)).permutation(n) < share * n).astype(float)
        found[Cell(MODEL, row.replace("_", "-"), of.bits, of.where)] = Measured(2.1, {"vqa": right})
    return found


def test_every_method_and_preset_is_a_row_that_is_measured_once() -> None:
    assert set(ROWS) == {*METHODS, *PRESETS, *EXTRA}
    every = [cell for _, portion in cells(MODELS, ROWS, WIDTHS, WHERE) for cell in portion]
    assert len(every) == len(set(every))
    measured = {(cell.row, cell.bits) for cell in every}
    for row in with_hosts(ROWS):
        method = str((PRESETS | HOSTS | EXTRA).get(row, {"method": row})["method"])
        assert {bits for name, bits in measured if name == row} == set(METHODS[method].widths) & set(WIDTHS), row
    assert {what for what, _ in TURNS} == {WEIGHTS, BOTH, ROUNDED, PRUNED}
    assert every[0] == Cell(MODELS[0], "uniform", 2, "vision")


def test_a_host_differs_from_its_row_and_is_of_its_kind() -> None:
    for row, host in ADDS_TO.items():
        widths = {bits for bits in WIDTHS if (row, bits) in widths_of(row) and (host, bits) in widths_of(host)}
        assert widths, row
        for bits in widths:
            ours, theirs = scheme_of(row, bits), scheme_of(host, bits)
            assert ours != theirs or kind(host, bits) == BOTH
            assert (ours.activations, ours.cache, ours.symmetric) == (
                theirs.activations,
                theirs.cache,
                theirs.symmetric,
            )
    assert kind("gptaq", 3) == kind("gptq, exposed", 3) == BOTH
    assert kind("norm-tweak", 3) == WEIGHTS
    assert kind("wkv", 4) == ROUNDED


def widths_of(row: str) -> set[tuple[str, int]]:
    return {(cell.row, cell.bits) for _, portion in cells([MODEL], [row], WIDTHS, WHERE) for cell in portion}


def test_the_record_is_read_as_it_was_written(vqa: Task, tmp_path: Path) -> None:
    known = planted(vqa, rtn=0.3, gptq=0.9)
    record.write(file := tmp_path / "record.csv", known, 32)
    again = record.read(file, 100, 32)
    assert again.keys() == known.keys()
    assert all(np.array_equal(again[cell].right["vqa"], one.right["vqa"]) for cell, one in known.items())
    assert [again[cell].stored for cell in known] == [one.stored for one in known.values()]
    text = file.read_text()
    record.write(file, again, 32)
    assert file.read_text() == text
    with pytest.raises(UserError, match=r"record.csv was measured with --n 100 --examples 32; use these, or name"):
        record.read(file, 50, 32)


def test_a_row_whose_settings_changed_is_measured_again(
    vqa: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.write(file := tmp_path / "record.csv", planted(vqa, tlq=0.3, gptq=0.9), 32)
    monkeypatch.setitem(PRESETS, "tlq", {**PRESETS["tlq"], "exponents": 5})
    record.settings_mark.cache_clear()
    assert {cell.row for cell in record.read(file, 100, 32)} == {record.NATIVE, "gptq"}
    record.settings_mark.cache_clear()


def test_the_page_says_what_was_planted(vqa: Task) -> None:
    """gptq is best, awq not told apart from it, clip worse than its host, and norm-tweak noise."""
    known = planted(vqa, rtn=0.5, clip=0.1, gptq=0.96, norm_tweak=0.96, awq=0.95)
    known[Cell(MODEL, "awq", 2, "all")].right["vqa"][:] = known[Cell(MODEL, "gptq", 2, "all")].right["vqa"]
    known[Cell(MODEL, "awq", 2, "all")].right["vqa"][:1] = 0
    asked = [cell for cell in known if cell.row != record.NATIVE] + [Cell(MODEL, "spqr", 2, "all")]
    text = "\n".join(page.page(known, asked, [vqa], 32))
    assert "5 of 6 cells" in text
    assert "* vqa, weights at 2 bits: 1" in text
    assert "| gptq | – | 1 of 1 | 1 of 1 | 1 of 1 | 1.00 |" in text
    assert "| clip | – | 0 of 1 | 0 of 1 | 0 of 1 | 0.00 |" in text
    assert "**gptq 2** (2.10) -0.040" in text
    assert "* Better than its host more often than by chance, and not worse: `gptq` (1 above, 0 below, of 1)." in text
    assert "the opposite of what is published: `clip` (0 above, 1 below, of 1)." in text
    assert "the published gain does not show: `norm-tweak` (0 above, 0 below, of 1)." in text


def test_an_empty_record_makes_a_page(vqa: Task) -> None:
    text = "\n".join(page.page({}, [Cell(MODEL, "rtn", 2, "all")], [vqa], 32))
    assert "0 of 1 cells" in text
