"""The type of numbers of a sweep: as stored, or float32 where that is quicker; said, and the study's own ever after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sensitivity.api import sweeping as verbs
from sensitivity.api.sweeping import dtype_for
from sensitivity.cli.main import main
from sensitivity.measure.forecast.hardware import slowdown
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import PACKAGE
from sensitivity.study.study import Study

EMBEDDED = PACKAGE / "models" / "embedded" / "scenes-llava"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that is stored in float16, and is not the embedded one, whose type is known."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "stored"))


def test_float32_is_as_quick_as_itself() -> None:
    assert 0.2 < slowdown(torch.float32, torch.device("cpu")) < 5


@pytest.mark.parametrize(
    ("times", "memory", "chosen", "words"),
    [
        (90.0, 1 << 40, "float32", "computing in float32: float16, as stored, is 90.0 times slower here"),
        (1.1, 1 << 40, "float16", ""),
        (0.5, 1 << 40, "float16", ""),
        (90.0, 1 << 20, "float16", "float16 is 90.0 times slower here than float32, for which memory is too small"),
    ],
)
def test_the_quicker_one_is_taken_where_it_fits(
    folder: Path, times: float, memory: int, chosen: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "slowdown", lambda *_: times)
    monkeypatch.setattr(verbs, "free_memory", lambda: memory)
    found, why = dtype_for(str(folder), "cpu", folder.parent / "out")
    assert found == chosen
    assert why.startswith(words)
    assert bool(why) == bool(words)


def test_a_device_that_is_none_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="unknown device 'abacus'; choose from cpu, cuda"):
        dtype_for(str(folder), "abacus", folder.parent / "out")


def test_a_study_goes_on_in_its_own_type(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    line = f"sweep {folder} --task vqa --bits 8 --by part --search one-at-a-time --n 8 --out {out} --json".split()
    monkeypatch.setattr(verbs, "slowdown", lambda *_: 90.0)
    assert main(line) == 0
    assert '{"note": "computing in float32: float16, as stored, is 90.0 times slower here' in capsys.readouterr().err
    assert Study(out).meta["dtype"] == "float32"
    monkeypatch.setattr(verbs, "slowdown", lambda *_: 0.5)  # another machine, say
    assert main(line) == 0
    printed = capsys.readouterr()
    assert "computing in" not in printed.err
    assert json.loads(printed.out)["waiting"] == 0
    assert main([*line, "--dtype", "fp16"]) == 2  # what is asked for is never replaced
    assert "dtype: there float32, here float16" in capsys.readouterr().err
