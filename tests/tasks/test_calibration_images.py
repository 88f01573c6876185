"""One file of questions serves calibration and evaluation: no image, whatever it is called, is in both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sensitivity.api.sweeping import with_calibration
from sensitivity.cli.main import main
from sensitivity.measure.passes.token_batches import check_disjoint
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task


def pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / name)


def lines(folder: Path, images: Sequence[str | list[str]], **more: str) -> str:
    asked = [{"image": name, "prompt": "where is the 3?", "answers": ["top left"], **more} for name in images]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return str(folder / "q.jsonl")


def contents(found: Task) -> set[bytes]:
    return {example.image.read_bytes() for example in found.examples if isinstance(example.image, Path)}


def test_every_image_is_in_one_split_for_every_seed_and_number(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(40)]
    pictures(tmp_path, names)
    file = lines(tmp_path, names * 2)
    calibration = task(file, "calibration")
    assert len({example.cluster for example in calibration.examples}) == 4
    assert len(calibration.examples) == 8
    for n, seed in ((1000, 0), (1000, 1_000_003), (10, 5)):
        evaluation = task(file, "evaluation", n, seed)
        assert contents(evaluation).isdisjoint(contents(calibration))
        check_disjoint([task(file, "calibration", n, seed)], [evaluation])
    assert contents(task(file)) | contents(calibration) == {(tmp_path / name).read_bytes() for name in names}
    (note,) = task(file).notes
    assert note == "no line has a split: evaluation examples leave out 4 of 40 images, which are kept for calibration"


def test_an_image_of_several_names_is_in_one_split(tmp_path: Path) -> None:
    """Exports of data sets often write an image once per question."""
    names = [f"{i}.png" for i in range(30)]
    pictures(tmp_path, names)
    (tmp_path / "sub").mkdir()
    others = []
    for name in names:
        shutil.copy(tmp_path / name, tmp_path / f"copy-{name}")
        (tmp_path / f"link-{name}").symlink_to(name)
        others += [f"copy-{name}", f"link-{name}", f"sub/../{name}", f"./{name}", str(tmp_path / name)]
    file = lines(tmp_path, [*names, *others])
    calibration, evaluation = task(file, "calibration"), task(file)
    assert contents(calibration).isdisjoint(contents(evaluation))
    assert len(calibration.examples) == 3 * 6
    assert len(evaluation.examples) == 27 * 6


def test_images_of_one_line_stay_together_with_all_that_share_one(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(60)]
    pictures(tmp_path, names)
    asked = [[names[i], names[i + 1]] for i in range(0, 40, 2)] + [[names[40], names[41]], [names[41], names[42]]]
    file = lines(tmp_path, [*asked, *names])
    calibration, evaluation = task(file, "calibration"), task(file)
    used = [{image.name for e in found.examples for image in e.images} for found in (calibration, evaluation)]  # type: ignore[union-attr]
    assert used[0].isdisjoint(used[1])
    assert used[0] | used[1] == set(names)
    assert len({names[40], names[41], names[42]} & used[0]) in (0, 3)
    check_disjoint([calibration], [evaluation])
    assert len(calibration.examples) + len(evaluation.examples) == len(asked) + len(names)


def test_the_same_images_wherever_the_folder_is(tmp_path: Path) -> None:
    drawn = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        names = [f"{i}.png" for i in range(20)]
        pictures(folder, names)
        drawn.append({example.cluster for example in task(lines(folder, names), "calibration").examples})
    assert drawn[0] == drawn[1]


def test_splits_that_are_named_are_kept_and_few_images_are_not_divided(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(20)]
    pictures(tmp_path, names)
    file = lines(tmp_path, names, split="evaluation")
    assert len(task(file).examples) == 20
    with pytest.raises(UserError, match="has no calibration lines"):
        task(file, "calibration")
    few = lines(tmp_path, names[:4] * 3)
    assert len(task(few).examples) == 12
    assert task(few).notes == ()
    with pytest.raises(UserError, match="asks about fewer than 5 images, too few to keep one for calibration"):
        task(few, "calibration")


@pytest.mark.usefixtures("briefly_timed")
def test_a_calibrated_method_takes_one_file_and_says_what_is_left_out(
    scenes_llava: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{i}.png" for i in range(10)]
    pictures(tmp_path, names)
    file = lines(tmp_path, names)
    words = ["sweep", "embedded:scenes-llava", "--task", file, "--bits", "4", "--method", "gptq", "--dry-run"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    said = "q: no line has a split: evaluation examples leave out 1 of 10 images"
    assert said in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "run"), "--json"]) == 0
    notes = [json.loads(line)["note"] for line in capsys.readouterr().err.splitlines()]
    assert any(note.startswith(said) for note in notes)
    parts = inspect(scenes_llava, by="part")
    (named,), statistics = with_calibration(
        scenes_llava, parts, [scheme("gptq", 4)], [file], against=[task(file)], cache_gb=0
    )
    assert statistics is not None
    assert named.get("examples") == 1
    assert f"{named.get('data')}" == task(file, "calibration", 128).fingerprint
