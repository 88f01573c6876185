"""The experiment on GeoChat runs from end to end on a small model in GeoChat's layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.published import geochat_qvlm
from sensitivity.study.study import Study


@pytest.mark.slow  # five tasks under four plans
def test_it_runs_small_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    geochat_qvlm.main(["--smoke", "--out", str(tmp_path / "study"), "--n", "3"])
    text = capsys.readouterr().out
    assert text == (tmp_path / "study" / "geochat_qvlm.md").read_text()
    assert [trial.state.name for trial in Study(tmp_path / "study").trials()] == ["COMPLETE"] * 4
    assert text.count("(published 18.1)") == 1
    assert "nan" not in text
    assert "What the published figures would take" in text
    bits = next(line for line in text.splitlines() if line.startswith("| stored bits")).split("|")[2:6]
    assert [float(bits[0]), len(bits)] == [16, 4]  # tables of codebooks outweigh layers as small as these


def test_what_is_missing_is_said() -> None:
    with pytest.raises(SystemExit, match="error: name the folder of the data sets with --data FOLDER, or type --smoke"):
        geochat_qvlm.main([])
