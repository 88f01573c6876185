"""Input that is not as it should be: pictures of every kind, files cut short, NaN logits; and memory that is full."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import datasets

from sensitivity import verbs
from sensitivity.cli import main
from sensitivity.errors import Notice, UserError
from sensitivity.evaluate import answer, batches, evaluate
from sensitivity.models import VLM, inspect, load
from sensitivity.tasks import open_image, task
from sensitivity.tasks.images import TAIL, unusable
from sensitivity.trials import Study

# -- pictures: what a person sees in the file is what the model gets

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)  # 4 rows, 6 columns, no two pixels alike
COLOURS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)


def upright(path: Path, orientation: int, stored: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)


def palette(path: Path) -> None:
    image = Image.new("P", (6, 4))
    image.putpalette(COLOURS.reshape(-1).tolist())
    image.putdata(list(range(24)))
    image.save(path)


def cmyk(path: Path) -> None:
    ink = np.concatenate([255 - COLOURS, np.zeros((4, 6, 1), np.uint8)], axis=2)
    Image.frombytes("CMYK", (6, 4), ink.tobytes()).save(path)


GREY = np.repeat(RAMP[:, :, None], 3, axis=2)
KINDS: dict[str, tuple[str, Callable[[Path], None], np.ndarray]] = {
    "plain": ("a.png", lambda path: Image.fromarray(COLOURS).save(path), COLOURS),
    "grey": ("a.png", lambda path: Image.fromarray(RAMP).save(path), GREY),
    "16 bits": ("a.png", lambda path: Image.fromarray(RAMP.astype(np.uint16) * 256 + 200).save(path), GREY),
    "16 bits, tiff": ("a.tif", lambda path: Image.fromarray(RAMP.astype(np.uint16) * 256 + 7).save(path), GREY),
    "palette": ("a.png", palette, COLOURS),
    "palette, gif": ("a.gif", palette, COLOURS),
    "inks": ("a.tif", cmyk, COLOURS),
    "with alpha": ("a.png", lambda path: Image.fromarray(np.dstack([COLOURS, GREY[:, :, :1]])).save(path), COLOURS),
    "one bit": ("a.png", lambda path: Image.fromarray(RAMP > 100).save(path), np.where(GREY > 100, 255, 0)),
    # as a camera writes them: what was stored is turned (or mirrored) back on being read
    "mirrored": ("a.png", lambda path: upright(path, 2, COLOURS[:, ::-1]), COLOURS),
    "on its head": ("a.png", lambda path: upright(path, 3, COLOURS[::-1, ::-1]), COLOURS),
    "turned": ("a.png", lambda path: upright(path, 6, np.rot90(COLOURS).copy()), COLOURS),
    "turned the other way": ("a.png", lambda path: upright(path, 8, np.rot90(COLOURS, -1).copy()), COLOURS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_has_the_pixels_that_one_sees(tmp_path: Path, kind: str) -> None:
    name, write, expected = KINDS[kind]
    write(tmp_path / name)
    found = open_image(tmp_path / name)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_inks_in_a_jpeg_are_not_read_as_their_opposites(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # magenta and yellow: red
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg")).astype(int) - (255, 0, 0)).max() < 12


# -- files cut short


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_file_cut_short_is_noticed_and_a_whole_one_is_not(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    assert unusable(path) is None
    path.write_bytes(whole + b"what a camera adds" * 20)
    assert unusable(path) is None
    for share in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(share * len(whole))])
        assert unusable(path) in ("a truncated image", "an image that cannot be read")
    path.write_bytes(b"")
    assert unusable(path) == "an image that cannot be read"
    path.unlink()
    assert unusable(path) == "no image file"


def test_a_whole_jpeg_with_a_long_tail_is_decoded_and_passes(tmp_path: Path) -> None:
    path = datasets.picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(2 * TAIL))
    assert unusable(path) is None


def cut(path: Path) -> None:
    whole = datasets.picture(path, (90, 90)).read_bytes()
    path.write_bytes(whole[:-20])


def test_truncated_images_are_counted_before_a_sweep_and_more_than_the_share_refused(tmp_path: Path) -> None:
    datasets.gqa(tmp_path)
    chosen = task(f"gqa:{tmp_path}").examples
    paths = [example.image for example in chosen if isinstance(example.image, Path)]
    cut(paths[5])
    found = task(f"gqa:{tmp_path}")
    assert len(found.examples) == len(chosen) - 1
    lost = f"{chosen[5].id}: {paths[5].name}"
    assert found.notes[-1] == f"1 of {len(chosen)} examples left out: a truncated image ({lost})"
    for path in paths[6:9]:
        cut(path)
    with pytest.raises(UserError, match=r"4 of \d+ examples left out: a truncated image .*at most 2% may be left out"):
        task(f"gqa:{tmp_path}")


def test_a_users_own_truncated_image_is_named_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(tmp_path / "a.jpg")
    datasets.write(tmp_path / "q.jsonl", [{"image": "a.jpg", "prompt": "what?", "answers": ["this"]}])
    words = ["sweep", "embedded:scenes-llava", "--task", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert "1 of 1 examples left out: a truncated image (line-000001: a.jpg)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- logits that are no numbers


def nan_where(vlm: VLM, parameter: str) -> Callable[[], None]:
    """Make the model's logits NaN from now on; gives back what mends it."""
    found = dict(vlm.model.named_parameters())[parameter]
    before = found.data
    found.data = torch.full_like(before, float("nan"))
    return lambda: setattr(found, "data", before)


@pytest.fixture(scope="module")
def mine() -> VLM:
    """A model that tests may break."""
    return load("embedded:scenes-llava")


def test_nan_logits_at_full_precision_stop_the_sweep_and_name_examples(mine: VLM, tmp_path: Path) -> None:
    parts = inspect(mine, by="part")
    mend = nan_where(mine, "model.language_model.norm.weight")
    try:
        with pytest.raises(UserError, match=r"not numbers at full precision, on 4 of 4 examples \(vqa .*--dtype"):
            verbs.sweep(mine, parts, verbs.grid(parts, bits=(8,)), ["vqa"], tmp_path, n=4)
    finally:
        mend()
    study = Study(tmp_path)
    assert study.counts()["done"] == 0


def test_nan_logits_of_a_plan_score_nothing_and_are_counted(mine: VLM, tmp_path: Path) -> None:
    parts = inspect(mine, by="part")
    forward = mine.model.forward
    broken: list[bool] = [False]

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if broken[0]:
            found.logits = torch.full_like(found.logits, float("nan"))
        return found

    mine.model.forward = sometimes
    try:
        plans = verbs.grid(parts, bits=(8,))
        study, steps = verbs.sweeping(mine, parts, plans, ["vqa"], tmp_path, n=10)
        for step in steps:  # full precision first, then the plan that breaks
            broken[0] = step.plan.is_native and step.complete
    finally:
        del mine.model.forward
    table = study.table().set_index("native")
    assert table.loc[False, "not_finite"] == 10
    assert table.loc[False, "vqa"] == 0
    assert table.loc[True, "vqa"] > 0.5


# -- full device memory


class Small:
    """A device of our own size: a forward pass over more rows than that is out of memory."""

    def __init__(self, vlm: VLM, most: int) -> None:
        self.most, self.sizes = most, list[int]()
        self.hook = vlm.model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, _: object, args: Any, kwargs: Any) -> None:
        rows = len(kwargs["input_ids"])
        if rows > self.most:
            raise torch.OutOfMemoryError(f"{rows} rows")
        self.sizes.append(rows)

    def __enter__(self) -> Small:
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("plain", [False, True])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(mine: VLM, plain: bool, most: int) -> None:
    asked = task("vqa", n=20)
    expected = evaluate(mine, asked, plain)
    with Small(mine, most) as device, pytest.warns(Notice, match="out of memory on cpu: batches of vqa are halved"):
        found = evaluate(mine, asked, plain)
    for name in ("example", "score", "answer"):
        assert found[name] == expected[name]
    np.testing.assert_allclose(found["nll"], expected["nll"], rtol=1e-3, atol=2e-4)
    assert max(device.sizes) <= most


def test_halves_are_kept_for_the_plans_that_follow(mine: VLM) -> None:
    asked = task("vqa", n=20)
    (batch,) = batches(mine, asked)
    with Small(mine, 5), pytest.warns(Notice):
        first = answer(mine, asked, batch)
    with Small(mine, 5) as device, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(mine, asked, batch) == first
    assert max(device.sizes) <= 5


def test_a_sweep_goes_on_in_halves_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--task", "vqa", "--n", "10", "--bits", "4", "--json"]
    assert main(["sweep", "embedded:scenes-llava", *words, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    loaded = verbs.load

    def smaller(*args: Any, **kwargs: Any) -> VLM:
        vlm = loaded(*args, **kwargs)
        Small(vlm, 4)
        return vlm

    monkeypatch.setattr(verbs, "load", smaller)
    assert main(["sweep", "embedded:scenes-llava", *words, "--out", str(tmp_path / "halves")]) == 0
    assert capsys.readouterr().err.count("note: out of memory on cpu: batches of vqa are halved") == 1
    whole, halves = (Study(tmp_path / name).table().set_index("key") for name in ("whole", "halves"))
    assert halves["vqa"].to_dict() == whole["vqa"].to_dict()


def test_an_example_that_does_not_fit_alone_is_an_error(mine: VLM) -> None:
    alone = "a single example of vqa does not fit into the memory of cpu"
    with Small(mine, 0), pytest.warns(Notice), pytest.raises(UserError, match=alone):
        evaluate(mine, task("vqa", n=3))
