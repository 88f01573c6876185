"""What is said of a ranking, in the terminal, in the report and in Python, and that it is kept."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest

from sensitivity.analysis.importance import estimators
from sensitivity.analysis.importance.ranking import cached, rank
from sensitivity.analysis.reporting import sentences
from sensitivity.analysis.reporting.page import report
from sensitivity.cli import main as cli
from sensitivity.cli.output.tables import print_ranking

pytestmark = pytest.mark.usefixtures("few_trees")


def test_the_verb_tells_the_command_for_plans_near_full_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is typed for this study; and not where it was just run."""
    path = tmp_path / "a study"
    planted.study(path, {"a": lambda bits: 1.0 * (bits[:, 0] > 2) - 0.1 * planted.damage(bits[:, 2], 3)}, 0.005)
    command = ["rank", str(path), "--bootstraps", "2"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "this ranking rests on vision at 2 bits" in out
    assert f"note: `sensitivity rank '{path}' --near 0.9` says" in out
    assert cli.main([*command, "--near", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "Importance for a" in out
    assert "`sensitivity rank" not in out


def test_a_ranking_is_kept_until_the_trials_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = planted.study(tmp_path, {"a": planted.product}, 0.02, levels=(2, 4, 8))
    first = rank(study, bootstraps=2)
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "fit", None)  # whoever fits now fails
        again = rank(study, bootstraps=2)
        for name in ("table", "tau", "pairs", "levels"):
            pd.testing.assert_frame_equal(getattr(again, name), getattr(first, name))
        assert (again.dumps(), again.order, again.warnings) == (first.dumps(), first.order, first.warnings)
        with pytest.raises(TypeError):
            rank(study, bootstraps=2, near=0.5)
    assert cached(study, "a") is None  # that is the one with all resamples
    study.append([planted.plan(planted.PARTS, (2, 2, 2))], [{"a": 0.9}])
    assert rank(study, bootstraps=0, thorough=False).trials == first.trials + 1
    for file in (tmp_path / "rankings").iterdir():
        file.write_text("{")  # what cannot be read is made again
    assert rank(study, bootstraps=0, thorough=False).trials == first.trials + 1


def test_few_plans_have_no_intervals_which_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.array([[16] * 3, [16, 16, 3], [16, 16, 8], [16, 3, 16], [16, 8, 16], [3, 16, 16], [3] * 3, [8, 16, 16],
                     [8] * 3], dtype=float)  # fmt: skip
    study = planted.study(tmp_path, {"a": lambda bits: (8 - 2 * (bits[:, 0] == 3)) / 36 * (bits[:, 1] != 3)}, rows=rows)
    found = rank(study)
    assert found.no_intervals.startswith("9 trials give no intervals: ")
    assert re.match(r"<Ranking for a of 9 trials: \w+ \d+ %, \w+ \d+ %, \w+ \d+ %", repr(found))  # for users of Python
    assert repr(found).endswith(f". {found.no_intervals}>")
    assert rank(planted.observations(planted.product), bootstraps=2, thorough=False).no_intervals == ""
    assert rank(planted.observations(planted.product), bootstraps=0, thorough=False).no_intervals == ""
    print_ranking(found)
    told = capsys.readouterr().out
    assert told.count("no intervals") == 1
    assert not re.search(r"\bnan\b|unknown", told)
    page = report(study, tmp_path / "report").read_text()
    importance = page.split("Importance of the parts for a")[1].split("</table>")[0]
    assert "nan" not in importance
    assert importance.count("<td>–</td>") >= 3
    assert page.count(found.no_intervals) == 2  # where it is said how sure that is, and under the table
    assert not re.search(r"\[nan|nan[]–]", page)
    # nor is there one for the choice of method
    chosen = replace(found, choice={"consensus": 20.0, "consensus.low": math.nan, "consensus.high": math.nan})
    table = study.table()
    assert "decides 20 % of the differences in a; " in " ".join(sentences.summary(study, table, [], [chosen]).sure)
