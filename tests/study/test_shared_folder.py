"""A study as a folder for a hub: others choose plans from it, and it says nothing of the machine where it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import answered
import pandas as pd
import planted
import pytest
import yaml
from answered import NATIVE

from sensitivity.analysis.allocate.budget import solve
from sensitivity.cli.main import main
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.identity import without_folder
from sensitivity.study.storage import expected, paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task


def given(plan: Plan, example: Example) -> str:
    bits = sum(plan.bits().values())  # of full precision: 48
    return example.answers[0] if 8 * (int(example.id.split("-")[2]) % 6) < bits else "wrong"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    plans = [NATIVE, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 4, 8))[:20])]
    return answered.study(tmp_path / "secret" / "run", [task("vqa", n=30)], given, ["vqa"], n=30, plans=plans)


@pytest.mark.usefixtures("undrawn")
def test_others_choose_the_same_plans_without_the_model(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    assert main(["table", str(study.path), "--share", str(shared)]) == 0
    assert f"hf upload OWNER/NAME {shared} --repo-type dataset" in capsys.readouterr().out
    assert {one.name for one in shared.iterdir()} == {"README.md", "trials.parquet", "journal.log"}
    theirs = tmp_path / "theirs"
    shutil.copytree(shared, theirs)
    expected = [one.plan.key for one in solve(study, bpw=[4.0, 6.0], top=1)]
    shutil.rmtree(study.path.parent)
    assert [one.plan.key for one in solve(Study(theirs), bpw=[4.0, 6.0], top=1)] == expected
    assert main(["recommend", str(theirs), "--bpw", "6", "--no-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == expected[1]
    assert main(["report", str(theirs), "--json"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_what_was_expected_before_measuring_is_shared_too(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, another plan would be recommended from the shared folder than from the study."""
    damages = {
        name: {Scheme("codes", bits): (99.0 if name == "vision" else 1.0) / bits for bits in (2, 4, 8)}
        for name in planted.PARTS
    }
    expected.save(study.path, damages, "swing")
    shared = tmp_path / "shared"
    assert main(["table", str(study.path), "--share", str(shared)]) == 0
    assert expected.read(shared) == expected.read(study.path)
    chosen = []
    for folder in (study.path, shared):
        capsys.readouterr()
        assert main(["recommend", str(folder), "--bpw", "6", "--no-run", "--json"]) == 0
        chosen.append(json.loads(capsys.readouterr().out)["predicted"])
    assert chosen[0] == chosen[1]
    for name in ("plan.json", "plan.md"):
        (shared / name).unlink()
    paths.expected_file(study.path).unlink()
    assert main(["table", str(study.path), "--share", str(shared), "--force"]) == 0
    assert expected.read(shared) is None, "the study expects nothing any more"


def test_the_card_is_one_that_a_hub_reads(study: Study, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert main(["table", str(study.path), "--share", str(shared), "--examples"]) == 0
    card = (shared / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    files = {one["config_name"]: one["data_files"] for one in yaml.safe_load(front)["configs"]}
    assert files == {"trials": "trials.parquet", "answers": "answers.parquet"}
    assert len(pd.read_parquet(shared / "trials.parquet")) == len(study.trials())
    assert len(pd.read_parquet(shared / "answers.parquet")) == 30 * len(study.trials())
    assert "sensitivity recommend theirs --bpw 4.0 --no-run" in body
    assert "load_dataset(\"parquet\", data_files='trials.parquet')" in body
    assert main(["table", str(study.path), "--share", str(shared), "--force"]) == 0
    assert not (shared / "answers.parquet").exists(), "they were not asked for this time"


def test_no_folder_of_this_machine_is_told(study: Study, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    study.optuna_study.set_user_attr(
        "meta", {**study.meta, "model": "/home/me/llava", "tasks": ["iou:/home/me/q.jsonl"]}
    )
    assert main(["table", str(study.path), "--share", str(shared)]) == 0
    for file in shared.iterdir():
        assert b"/home/me" not in file.read_bytes(), file
    assert Study(shared).meta["tasks"] == ["iou:q.jsonl"]
    for source in ("vqa", "org/model", "embedded:scenes-llava", "a/b.jsonl"):
        assert without_folder(source) == source
    assert without_folder("vqav2:/data/x") == "vqav2:x"


def test_folders_of_calibration_data_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, source, noted in (("a", "vqa,iou:/home/me/q.jsonl", True), ("b", "vqa,iou:q.jsonl", False)):
        four = Scheme("gptq", 4, settings=(("calibration", source),))
        one = Study.create(tmp_path / name, planted.parts(), ["a"], {"model": "planted"})
        one.append([Plan.uniform(planted.parts(), scheme) for scheme in (None, four)], [{"a": 1.0}, {"a": 0.9}])
        assert main(["table", str(one.path), "--share", str(tmp_path / f"{name}-shared")]) == 0
        said = (
            "names folders of this machine: its plans were calibrated on iou:/home/me/q.jsonl;"
            in capsys.readouterr().err
        )
        assert said == noted


def test_only_an_earlier_shared_folder_is_replaced(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    line = ["table", str(study.path), "--share", str(shared)]
    assert main(line) == 0
    assert main(line) == 2
    assert "is already there; choose another --share or add --force" in capsys.readouterr().err
    (shared / "notes.txt").write_text("mine")
    assert main([*line, "--force"]) == 2
    assert "notes.txt is no file of a shared study" in capsys.readouterr().err
    (shared / "notes.txt").unlink()
    (shared / "README.md").write_text("mine")
    assert main([*line, "--force"]) == 2
    assert "its README.md was not written here" in capsys.readouterr().err
    assert (shared / "README.md").read_text() == "mine"
