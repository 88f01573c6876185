"""Tables wrap between words; where a terminal is too narrow for that, rows are printed as lines."""

from __future__ import annotations

import pytest

from sensitivity.cli.output.tables import LONG_WORD, print_table

HEADS = ("what", "score", "difference", "plan")
ROWS = (
    ("full precision", "0.983 at 16.00", "+0.000 [-0.060, +0.060]", "all native [a list]"),
    ("best within 4 bpw", "0.933 at 3.95", "-0.050 [-0.156, +0.056]", "vision 4 · language 3"),
)
WORDS = {word for row in (HEADS, *ROWS) for cell in row for word in cell.split()}


@pytest.mark.parametrize("columns", [20, 37, 38, 44, 60, 200])
def test_no_word_is_cut(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table("Scores", HEADS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert {word.removesuffix(":") for line in lines[2:] for word in line.split()} == WORDS
    narrow = columns < 38  # the longest words and the gaps between columns take 38
    assert sum(line.startswith("  plan: ") for line in lines) == len(ROWS) * narrow
    assert narrow == (lines[2] == "what: full precision")
    assert max(map(len, lines)) <= columns


def test_a_long_word_is_cut_rather_than_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table("Files", ("file", "n"), [("x" * 3 * LONG_WORD, 3)])
    assert "x" * 30 in (out := capsys.readouterr().out)
    assert out.count("x") == 3 * LONG_WORD
    assert "file:" not in out


def test_without_a_terminal_or_a_width_there_are_120_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table("Long", ("text",), [("word " * 60,)])
    assert 100 < max(map(len, capsys.readouterr().out.splitlines())) <= 120
