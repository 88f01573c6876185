"""Experiments and benchmarks run: a few examples of each, so that none of them rots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_cliffs(tmp_path: Path) -> None:
    words = ["--smoke", "--out", str(tmp_path / "cliffs.md"), "--runs", str(tmp_path / "runs")]
    subprocess.run([sys.executable, ROOT / "experiments" / "cliffs.py", *words], check=True, capture_output=True)
    text = (tmp_path / "cliffs.md").read_text()
    assert "## embedded:scenes-llava-heavy" in text
    assert "synthetic outliers, same function" in text
    assert text.count("| all |") == 8
