"""A study that may not be written, and one whose questions are elsewhere: a sentence that says what to do, at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import forked

from sensitivity.cli.main import main

SWEEP = "sweep embedded:scenes-llava --task {} --bits 2,8 --by part --search one-at-a-time --n 4 --out {}"
# root may write everything, unless it gives up its capabilities
AS_ANYONE = """
import ctypes, os, sys
if not os.getuid():
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
from sensitivity.models import loading
loading.load = None  # nothing is computed
from sensitivity.cli.main import main
print(main(sys.argv[1:]), flush=True)
"""


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A study of another user, with a report and a verification."""
    study = tmp_path_factory.mktemp("runs") / "theirs"
    assert main(SWEEP.format("vqa", study).split()) == 0
    shutil.copytree(study, study / "verify")
    (study / "report").mkdir()
    folders = [study, *(path for path in study.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield study
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (SWEEP.format("vqa", "STUDY"), "copy the study (`cp -r STUDY COPY`"),
        ("plan embedded:scenes-llava --task vqa --bpw 4 --n 4 --out STUDY", "copy the study (`cp -r STUDY COPY`"),
        ("recommend STUDY --bpw 9", "copy the study (`cp -r STUDY COPY`"),
        ("recommend STUDY --bpw 9 --no-run", "copy the study (`cp -r STUDY COPY`"),
        ("failures STUDY --plan all --causes", "copy the study (`cp -r STUDY COPY`"),
        ("explain STUDY --plan 1", "copy the study (`cp -r STUDY COPY`"),
        ("export STUDY --bpw 9 --path exposed --format fake --out NEW/export", "copy the study (`cp -r STUDY COPY`"),
        ("report STUDY", "STUDY/report may not be written; choose another --out"),
    ],
)
def test_what_may_not_be_written_is_said_before_anything_is_computed(
    line: str, advice: str, locked: Path, tmp_path: Path
) -> None:
    if "--plan all" in line:
        key = next(path.stem for path in sorted((locked / "examples").iterdir()))
        line = line.replace("--plan all", f"--plan {key[:8]}")
    words = line.replace("STUDY", str(locked)).replace("NEW", str(tmp_path)).split()
    status, *notes, last = forked(AS_ANYONE, words).splitlines()
    assert status == "2"
    assert last.startswith("error: ")
    assert advice.replace("STUDY", str(locked)) in last
    assert all(note.startswith("note: ") for note in notes)


def test_a_study_that_may_not_be_written_is_read_all_the_same(locked: Path, tmp_path: Path) -> None:
    for line in (f"rank {locked} --bootstraps 2", f"report {locked} --out {tmp_path}/page", f"watch {locked} --once"):
        assert forked(AS_ANYONE, line.split()).splitlines()[-1] == "0", line


def test_other_files_in_the_place_of_the_verification_are_named(
    locked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(locked, mine, ignore=shutil.ignore_patterns("verify"))
    mine.chmod(0o755)
    (mine / "verify").mkdir()
    (mine / "verify" / "thesis.tex").write_text("mine")
    for verb in ("recommend", "export --path exposed --format fake --out NEW"):
        assert main(f"{verb} {mine} --bpw 9".replace("NEW", str(tmp_path / "new")).split()) == 2
        said = f"{mine}/verify is where plans are verified, and holds other files (thesis.tex); move them elsewhere"
        assert said in capsys.readouterr().err
    assert [path.name for path in (mine / "verify").iterdir()] == ["thesis.tex"]
    assert main(f"recommend {mine} --bpw 9 --no-run".split()) == 0


def test_a_study_whose_questions_are_elsewhere_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    file, study = tmp_path / "mine.jsonl", tmp_path / "study"
    file.write_text(json.dumps({"image": "a.png", "prompt": "what color ?", "answers": ["red"]}))
    assert main(SWEEP.format(file, study).split()) == 0
    file.unlink()
    capsys.readouterr()
    assert main(f"recommend {study} --bpw 9".split()) == 2
    assert f"{file} is not there" in (said := capsys.readouterr().err)
    assert "add --no-run" in said
    assert main(f"recommend {study} --bpw 9 --no-run".split()) == 0
