"""Verbs as a user types them: which plan export chose, which budget a sweep suggests, and what a terminal can show."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import planted
import pytest

from sensitivity.analysis.allocate.budget import Candidate
from sensitivity.api.exporting import _choice_in_words, _note, export
from sensitivity.cli import main as cli
from sensitivity.cli.output.sweep_summary import _budget
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study
from sensitivity.tasks.table import task


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
    assert re.search(r"predicted: vqa 0\.\d+, beside 1\.000 of full precision; `sensitivity recommend ", said)
    assert f"{path} --bpw 6` measures the best plans" in said
    best = Candidate(planted.plan(planted.PARTS, [4, 4, 4]), Study(path).size(Study(path).native), 6.0, 0, {})
    typed = _choice_in_words(Study(path), best, "awq")  # of other plans, awq may not load the best
    assert f"{path} --bpw 6 --runtime awq` measures the best plans" in typed
    native = next(trial for trial in Study(path).measured() if trial.plan.is_native).scores["vqa"]["mean"]
    assert f"beside {native:.3f} of full precision" in said
    assert cli.main(["export", str(path), "--bpw", "16", "--out", str(tmp_path / "full.json")]) == 0
    assert "measured: vqa 1.000" in capsys.readouterr().err


@pytest.mark.parametrize("levels", [(2, 16), (8, 16), (16,)])
def test_the_budget_that_a_sweep_suggests_can_be_met(tmp_path: Path, levels: tuple[int, ...]) -> None:
    study = planted.study(tmp_path / "study", {"vqa": planted.additive}, levels=levels)
    smallest = min(trial.bpw for trial in study.measured())
    assert smallest <= _budget(study) <= max(4.0, smallest + 0.5)
    assert _budget(study) >= 4


def test_an_encoding_without_a_character_ends_no_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted.study(tmp_path / "study", {"vqa": planted.additive}, levels=(2, 4, 16)).path
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["recommend", str(path), "--bpw", "6"]) == 0
    shown.seek(0)
    assert "\\xb7" in shown.read()  # the dot between the components of a plan


def test_boxes_among_answers_are_told_their_scorers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "b.jpg", "prompt": "Where?", "boxes": [[1, 2, 3, 4]]}))
    with pytest.raises(UserError, match="lacks answers; for boxes, type iou:FILE or recall:FILE"):
        task(str(tmp_path / "a.jsonl"))


def test_a_study_that_cannot_be_written_does_not_undo_an_export(tmp_path: Path) -> None:
    (tmp_path / "exports").write_text("a file where notes would be")
    with pytest.warns(Notice, match="out is whole, but .* does not list it"):
        _note(tmp_path, tmp_path / "out", {"format": "fake"})


def test_weights_that_were_quantized_already_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = inspect("embedded:scenes-llava", by="part")
    study = Study.create(tmp_path / "study", parts, ["vqa"], {"model": "embedded:scenes-llava"})
    plan, native = (Plan.uniform(parts, one) for one in (scheme("rtn", 4), None))
    for one, folder in ((plan, "fake"), (native, "whole")):
        export(study, one, tmp_path / folder, "fake", note=False)
    told = 'these weights were quantized already: all rtn:4 of embedded:scenes-llava; "full precision" here is that'
    capsys.readouterr()
    for folder, said in (("fake", True), ("whole", False)):
        assert cli.main(["inspect", str(tmp_path / folder)]) == 0
        assert (told in capsys.readouterr().out) == said
        flags = ["--task", "vqa", "--n", "4", "--bits", "4", "--out", str(tmp_path / "new"), "--dry-run"]
        for verb in (["sweep"], ["plan", "--bpw", "5"]):
            assert cli.main([verb[0], str(tmp_path / folder), *verb[1:], *flags]) == 0
            assert (f"note: {told}" in capsys.readouterr().err) == said
    (tmp_path / "fake" / "sensitivity.json").write_text("{}")  # of another program
    assert load(str(tmp_path / "fake"), config_only=True).quantized_before is None
