"""sensitivity export as a user types it: which plan it chose is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest

from sensitivity.cli import main as cli


def test_an_export_for_a_budget_says_which_plan_was_chosen_and_whether_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # two components are never quantized together, so that no plan of 4 bits per weight is measured
    rows = np.array([[16.0] * 3, *([b if i == at else 16.0 for i in range(3)] for at in range(3) for b in (2, 4, 8))])
    path = planted.study(tmp_path / "study", {"vqa": planted.additive}, rows=rows).path
    assert cli.main(["export", str(path), "--bpw", "6", "--out", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().err
    assert "note: chosen for 6 bpw: vision " in said
    assert "which was never measured; predicted: vqa 0." in said
    assert " % of full precision; `sensitivity recommend " in said
    assert f"{path} --bpw 6` measures the best plans" in said
    assert cli.main(["export", str(path), "--bpw", "16", "--out", str(tmp_path / "full.json")]) == 0
    assert "measured: vqa 1.000" in capsys.readouterr().err
