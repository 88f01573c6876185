"""Tables wrap between words; where a terminal is too narrow for that, rows are printed as lines."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import planted
import pytest
import torch
from planted import frame

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.recommending.judging import judge, unmeasured
from sensitivity.analysis.reporting.frontier_table import MAX_ROWS
from sensitivity.analysis.reporting.page import report
from sensitivity.api.explaining import Explanation
from sensitivity.cli.main import main
from sensitivity.cli.output.explained_tables import print_explanation
from sensitivity.cli.output.progress import best_so_far, frontier_lines
from sensitivity.cli.output.tables import LONG_WORD, print_frontier, print_recommendation, print_table

pytestmark = pytest.mark.usefixtures("few_trees")
HEADS = ("what", "score", "difference", "plan")
ROWS = (
    ("full precision", "0.983 at 16.00", "+0.000 [-0.060, +0.060]", "all native [a list]"),
    ("best within 4 bpw", "0.933 at 3.95", "-0.050 [-0.156, +0.056]", "vision 4 · language 3"),
)
WORDS = {word for row in (HEADS, *ROWS) for cell in row for word in cell.split()}


def test_numbers_stand_to_the_right_and_plans_never(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Plans", ("plan", "n"), [("07bf2c60 all 2", "7"), ("6d05e682 vision 2 · language 4", "12")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("07bf2c60 all 2 ")
    assert lines[3].endswith("  7")


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


def test_of_two_tasks_full_precision_stands_beside_each_in_the_order_of_the_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uniform plan's figure is a share of full precision, as the plan's own is, and says so."""
    made = planted.study(tmp_path, {"ground": planted.product, "vqa": planted.product})
    weights = {"vqa": 1.0, "ground": 1.0}
    best, rival = solve(made, bpw=5, weights=weights, top=1)[0], solve(made, bpw=6, weights=weights, top=1)[0]
    rows = {
        key: pd.concat([frame(of["vqa"]).assign(task="vqa"), frame(of["ground"]).assign(task="ground")])
        for key, of in {
            made.native.key: {"vqa": 0.9, "ground": 0.8},
            best.plan.key: {"vqa": 0.6, "ground": 0.4},
            rival.plan.key: {"vqa": 0.3, "ground": 0.2},
        }.items()
    }
    print_recommendation(judge(made, [best], rival, rows, weights))
    said = capsys.readouterr().out.splitlines()
    one, two = (next(i for i, line in enumerate(said) if line.startswith(f"  {task} 0.")) for task in weights)
    assert two == one + 1
    assert said[one].startswith("  vqa 0.600 [")
    assert ", full precision 0.900 [" in said[one]
    assert ", full precision 0.800 [" in said[two]
    assert any(
        line.startswith("  best uniform plan within the budget: ") and ", share of full precision 0.29" in line
        for line in said
    )
    only_predicted = unmeasured(made, [best], weights)
    print(only_predicted)
    assert len(shown := capsys.readouterr().out) < 400  # a notebook shows it where a cell ends
    assert shown.startswith(f"<Recommendation for 5 bpw: {best.plan.describe()}, ")
    print_recommendation(only_predicted)
    assert "  predicted share of full precision in 0.5 vqa + 0.5 ground " in capsys.readouterr().out


@pytest.mark.parametrize(("vision", "said"), [(4.0, "100.0 in all"), (3.6, "100.0 in all; -10.0 more is of vision")])
def test_a_rest_of_vision_is_named_only_where_there_is_one(
    vision: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class token can lower the loss that patches raise."""
    blame = SimpleNamespace(
        components={"vision": 4.0}, modalities={"vision": vision}, regions={0: torch.ones(2, 2, dtype=torch.double)}
    )
    found = SimpleNamespace(
        plan=planted.plan(planted.PARTS, [4] * 3),
        integral=SimpleNamespace(before=0.0, after=4.0, change=4.0, passes=3, missing=0.0),
        blame=blame,
        examples=("one",),
        of_failures=False,
        data=[{"task": "vqa"}],
        boxes={},
    )
    print_explanation(cast(Explanation, found))
    title = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Share by place"))
    assert said in title
    assert ("no patches" in title) == (vision != 4.0)


def test_of_many_plans_on_the_frontier_some_of_all_sizes_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.array([*([2, 2, language] for language in range(2, 17)), *([2, c, 16] for c in range(3, 17))], float)
    made = planted.study(tmp_path / "run", {"vqa": lambda bits: bits.sum(axis=1) / 48}, rows=rows)
    every = made.table()["bpw"].tolist()
    assert [trial.bpw for trial in best_so_far(made)] == every  # all are on it, more of them among the larger ones
    for shown, left_out in (
        (lambda: print_frontier(made), "12 of the frontier's 29 plans, spread over all sizes; `sensitivity watch "),
        (lambda: print("\n".join(frontier_lines(made))), "8 of the frontier's 29 plans, spread over all sizes\n"),
    ):
        shown()
        told = capsys.readouterr().out
        assert left_out in told
        sizes = [float(line.split()[0]) for line in told.splitlines() if re.match(r" *\d+\.\d\d ", line)]
        assert len(sizes) == int(left_out.split()[0])
        assert (sizes[0], sizes[-1]) == (round(every[0], 2), round(every[-1], 2))
        steps = np.diff(np.log(sizes))
        assert steps.max() < 1.6 * np.log(every[-1] / every[0]) / (len(sizes) - 1)
    assert main(["watch", str(made.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["frontier"]) == 29


def test_a_report_says_which_plans_of_the_frontier_it_leaves_out(tmp_path: Path) -> None:
    rows = np.array([[v, c, 16] for v in range(2, 7) for c in range(2, 13)], float)
    made = planted.study(
        tmp_path / "run", {"vqa": lambda bits: (1000 * bits[:, 0] + 100 * bits[:, 1]) / 2e4}, rows=rows
    )
    assert (plans := len(best_so_far(made))) > MAX_ROWS
    page = report(made, tmp_path / "report").read_text()
    assert f"{MAX_ROWS} of the frontier&#39;s {plans} plans, spread over all sizes" in page
    table = page.split("The plans on the frontier of vqa")[1].split("</table>")[0]
    assert table.count("<tr>") == MAX_ROWS + 1
    assert f"<td>{min(made.table()['bpw']):.2f}</td>" in table


def test_a_part_that_stays_native_is_named_with_what_rules_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = planted.study(tmp_path / "run", {"vqa": planted.product})
    best = solve(made, bpw=5, top=1)[0]
    for bits, told in (((3, 16, 4), "  connector at native"), ((3, 16, 16), "  2 parts at native"), ((3, 8, 4), "")):
        print_recommendation(unmeasured(made, [replace(best, plan=planted.plan(planted.PARTS, bits))]))
        said = capsys.readouterr().out
        assert ("--allow '*=B,B,...'" in said) == bool(told)
        assert told in said
