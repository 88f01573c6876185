"""Input that is not as it should be: pictures of every kind, files cut short, NaN logits; and memory that is full."""

from __future__ import annotations

import ctypes
import gc
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from PIL import Image

from experiments.small import datasets, models
from sensitivity.api.sweeping import begin_sweep, grid, one_at_a_time
from sensitivity.api.sweeping import sweep as sweep_
from sensitivity.cli.main import main
from sensitivity.measure import shards
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.evaluation import answer, evaluate
from sensitivity.measure.generate.batches import batches_by_image
from sensitivity.measure.loop import _SharedWork
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study
from sensitivity.tasks.examples.images import TAIL, open_image, why_unusable
from sensitivity.tasks.table import task

# -- pictures: what a person sees in the file is what the model gets

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)  # 4 rows, 6 columns, no two pixels alike
COLORS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)


def upright(path: Path, orientation: int, stored: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)


def palette(path: Path) -> None:
    image = Image.new("P", (6, 4))
    image.putpalette(COLORS.reshape(-1).tolist())
    image.putdata(list(range(24)))
    image.save(path)


def cmyk(path: Path) -> None:
    ink = np.concatenate([255 - COLORS, np.zeros((4, 6, 1), np.uint8)], axis=2)
    Image.frombytes("CMYK", (6, 4), ink.tobytes()).save(path)


GRAY = np.repeat(RAMP[:, :, None], 3, axis=2)
KINDS: dict[str, tuple[str, Callable[[Path], None], np.ndarray]] = {
    "plain": ("a.png", lambda path: Image.fromarray(COLORS).save(path), COLORS),
    "gray": ("a.png", lambda path: Image.fromarray(RAMP).save(path), GRAY),
    "16 bits": ("a.png", lambda path: Image.fromarray(RAMP.astype(np.uint16) * 256 + 200).save(path), GRAY),
    "16 bits, tiff": ("a.tif", lambda path: Image.fromarray(RAMP.astype(np.uint16) * 256 + 7).save(path), GRAY),
    "palette": ("a.png", palette, COLORS),
    "palette, gif": ("a.gif", palette, COLORS),
    "inks": ("a.tif", cmyk, COLORS),
    "with alpha": ("a.png", lambda path: Image.fromarray(np.dstack([COLORS, GRAY[:, :, :1]])).save(path), COLORS),
    "one bit": ("a.png", lambda path: Image.fromarray(RAMP > 100).save(path), np.where(GRAY > 100, 255, 0)),
    # as a camera writes them: what was stored is turned (or mirrored) back on being read
    "mirrored": ("a.png", lambda path: upright(path, 2, COLORS[:, ::-1]), COLORS),
    "on its head": ("a.png", lambda path: upright(path, 3, COLORS[::-1, ::-1]), COLORS),
    "turned": ("a.png", lambda path: upright(path, 6, np.rot90(COLORS).copy()), COLORS),
    "turned the other way": ("a.png", lambda path: upright(path, 8, np.rot90(COLORS, -1).copy()), COLORS),
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
    assert why_unusable(path) is None
    path.write_bytes(whole + b"what a camera adds" * 20)
    assert why_unusable(path) is None
    for share in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(share * len(whole))])
        assert why_unusable(path) in ("a truncated image", "an image that cannot be read")
    path.write_bytes(b"")
    assert why_unusable(path) == "an image that cannot be read"
    path.unlink()
    assert why_unusable(path) == "no image file"


def test_a_whole_jpeg_with_a_long_tail_is_decoded_and_passes(tmp_path: Path) -> None:
    path = datasets.picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(2 * TAIL))
    assert why_unusable(path) is None


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
    lost = f"{chosen[5].id}: {paths[5].relative_to(tmp_path)}"
    assert found.notes[-1] == f"1 of {len(chosen)} examples left out: a truncated image ({lost})"
    for path in paths[6:9]:
        cut(path)
    with pytest.raises(UserError, match=r"4 of \d+ examples left out: a truncated image .*at most 2 % may be left out"):
        task(f"gqa:{tmp_path}")


def test_a_users_own_truncated_image_is_named_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(tmp_path / "a.jpg")
    datasets.write(tmp_path / "q.jsonl", [{"image": "a.jpg", "prompt": "what?", "answers": ["this"]}])
    words = ["sweep", "embedded:scenes-llava", "--task", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "run")]
    assert main(words) == 2
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
            sweep_(mine, parts, grid(parts, bits=(8,)), ["vqa"], tmp_path, n=4)
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
        plans = grid(parts, bits=(8,))
        study, steps = begin_sweep(mine, parts, plans, ["vqa"], tmp_path, n=10)
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
    asked = task("vqa", n=10)
    expected = evaluate(mine, asked, plain)
    with Small(mine, most) as device, pytest.warns(Notice, match="out of memory on cpu: batches of vqa are halved"):
        found = evaluate(mine, asked, plain)
    for name in ("example", "score", "answer"):
        assert found[name] == expected[name]
    np.testing.assert_allclose(found["nll"], expected["nll"], rtol=1e-3, atol=2e-4)
    assert max(device.sizes) <= most


def test_halves_are_kept_for_the_plans_that_follow(mine: VLM) -> None:
    asked = task("vqa", n=20)
    (batch,) = batches_by_image(mine, asked)
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
    loaded = load

    def smaller(*args: Any, **kwargs: Any) -> VLM:
        vlm = loaded(*args, **kwargs)
        Small(vlm, 4)
        return vlm

    monkeypatch.setattr("sensitivity.models.loading.load", smaller)
    assert main(["sweep", "embedded:scenes-llava", *words, "--out", str(tmp_path / "halves")]) == 0
    assert capsys.readouterr().err.count('{"note": "out of memory on cpu: batches of vqa are halved"}') == 1
    whole, halves = (Study(tmp_path / name).table().set_index("key") for name in ("whole", "halves"))
    assert halves["vqa"].to_dict() == whole["vqa"].to_dict()


def test_what_plans_share_is_given_up_before_a_single_example_fails(mine: VLM) -> None:
    """A device that has room for every batch, and for few hidden states beside it."""
    parts, asked = inspect(mine, by="group"), task("vqa", n=10)
    plans = [Plan.of(parts, {"language.end": scheme("rtn", bits)}) for bits in (3, 4)]
    expected = [_SharedWork(mine, parts, [asked], plain=True).run(plan, 0, 10) for plan in plans]
    trial = _SharedWork(mine, parts, [asked], growing=False)
    cache = trial.prefix_cache
    assert cache is not None

    def look(*_: object) -> None:
        if cache._bytes > 10_000:
            raise torch.OutOfMemoryError

    hook = mine.model.register_forward_pre_hook(look)
    try:
        with pytest.warns(Notice) as said:
            found = [trial.run(plan, 0, trial.ends[-1]) for plan in plans]
    finally:
        hook.remove()
    messages = [str(one.message) for one in said]
    assert messages[-1].startswith("out of memory on cpu: plans share no more hidden states")
    assert {str(one) for one in messages[:-1]} == {"out of memory on cpu: batches of vqa are halved"}
    for ours, theirs in zip(found, expected, strict=True):
        assert dict(zip(ours["example"], ours["score"], strict=True)) == dict(
            zip(theirs["example"], theirs["score"], strict=True)
        )


def rows_of(args: Any, kwargs: Any) -> int:
    """Of the first tensor that a module is called with; the Q-Former's queries may stand for many images."""
    named = ("encoder_hidden_states", "query_embeds", "pixel_values", "input_ids", "hidden_states")
    found = [*(kwargs[name] for name in named if kwargs.get(name) is not None), *args]
    return len(found[0])


@contextmanager
def small(module: torch.nn.Module, most: int) -> Iterator[list[int]]:
    """A module that runs out of memory on more rows than that; those that it had."""
    sizes: list[int] = []

    def look(_: object, args: Any, kwargs: Any) -> None:
        sizes.append(rows_of(args, kwargs))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError(f"{sizes.pop()} rows")

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


@pytest.mark.parametrize(("module", "most"), [("vision_model", 3), ("qformer", 10)])
def test_a_gallery_is_searched_in_smaller_portions_and_a_sweep_goes_on_with_those(
    tmp_path: Path, module: str, most: int
) -> None:
    """While images are looked at, or while pairs are read together, after all images have been."""
    vlm = load(str(saved_vlms.save("blip2_itm", tmp_path / "itm")))
    parts = inspect(vlm, by="part")
    plans, names = one_at_a_time(parts, bits=(3,)), ["retrieval"]
    whole = sweep_(vlm, parts, plans, names, tmp_path / "whole", n=9)
    with small(vlm.model.get_submodule(module), most) as sizes, pytest.warns(Notice) as said:
        parted = sweep_(vlm, parts, plans, names, tmp_path / "parted", n=9)
    assert {str(one.message) for one in said} == {"out of memory on cpu: batches of retrieval are halved"}
    assert most // 2 <= max(sizes) <= most
    assert len(said) <= 12  # for the proof and the sweep, and not again for every plan
    for plan in plans:
        ours, theirs = parted.examples(plan), whole.examples(plan)
        assert ours is not None
        assert theirs is not None
        assert ours["answer"].tolist() == theirs["answer"].tolist()
        np.testing.assert_allclose(ours["nll"], theirs["nll"], rtol=1e-4)


def test_a_pair_that_does_not_fit_alone_is_an_error(tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save("blip2_itm", tmp_path / "itm")))
    alone = "a single example of retrieval does not fit into the memory of cpu"
    with small(vlm.model.vision_model, 0), pytest.warns(Notice), pytest.raises(UserError, match=alone):
        evaluate(vlm, task("retrieval", n=3))


@pytest.mark.parametrize("path", ["float", "exposed"])
@pytest.mark.parametrize("room", [1 << 30, 0])
def test_calibration_begins_anew_with_fewer_rows_and_finds_the_same(mine: VLM, path: str, room: int) -> None:
    """The memory is full in the middle of a pass, when the blocks before have counted its tokens already."""
    parts = inspect(mine, by="block")
    weights = [weight for weight in parts.weights if weight.part == "language"]
    whole = calibration_statistics(mine, parts, ["vqa"], n=24, path=path, gram_bytes=room).gather(weights)
    layer = mine.model.get_submodule("model.language_model.layers.3")
    with small(layer, 5) as sizes, pytest.warns(Notice, match="on cpu: batches of the calibration data are halved"):
        parted = calibration_statistics(mine, parts, ["vqa"], n=24, path=path, gram_bytes=room).gather(weights)
    assert max(sizes) <= 5
    for name, found in whole.items():
        assert parted[name].tokens == found.tokens
        assert parted[name].modalities.tolist() == found.modalities.tolist()
        torch.testing.assert_close(parted[name].gram, found.gram, rtol=1e-3, atol=1e-4 * float(found.gram.max()))


def test_calibration_data_that_does_not_fit_row_by_row_is_an_error(mine: VLM) -> None:
    alone = "a single example of the calibration data does not fit into the memory of cpu"
    with small(mine.model, 0), pytest.warns(Notice), pytest.raises(UserError, match=alone):
        calibration_statistics(mine, inspect(mine, by="part"), ["vqa"], n=3)


def test_an_example_that_does_not_fit_alone_is_an_error(mine: VLM) -> None:
    alone = "a single example of vqa does not fit into the memory of cpu"
    with Small(mine, 0), pytest.warns(Notice), pytest.raises(UserError, match=alone):
        evaluate(mine, task("vqa", n=3))


# -- memory that does not grow with the data


def held(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def most_memory(run: Callable[[], object]) -> int:
    """The most bytes of this process while something runs, beyond those it had before."""
    gc.collect()
    with suppress(OSError, AttributeError):  # what was freed goes back first: it would hide what is taken now
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = held("VmRSS")
    run()
    return held("VmHWM") - before


def memory_of_few_and_many(folder: Path) -> tuple[int, int]:
    """What a sweep over 16 images takes at most, and one over 56."""
    shards.MAX_IMAGES = 8
    vlm = load(str(models.save("geochat", folder / "model")), dtype="float32")
    parts = inspect(vlm, by="part")

    def sweep(count: int) -> None:
        datasets.COUNT = count
        datasets.gqa(folder / str(count))
        sweep_(vlm, parts, grid(parts, bits=(8,)), [f"gqa:{folder / str(count)}"], folder / f"{count}-study")

    sweep(8)  # what is loaded once
    return most_memory(lambda: sweep(16)), most_memory(lambda: sweep(56))


def test_memory_does_not_grow_with_the_images_of_a_sweep(tmp_path: Path) -> None:
    """Pictures that are megabytes as tensors; all of them together would show."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if held("VmHWM") > 1.02 * held("VmRSS"):
        pytest.skip("this kernel does not forget the most memory of a process")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a heap that other tests left in pieces grows by itself
        few, many = pool.submit(memory_of_few_and_many, tmp_path).result()
    whole = 4 * 3 * models.PIXELS**2  # bytes of an image
    assert few > 4 * whole  # what would be seen
    assert many - few < 0.2 * (56 - 16) * whole


@pytest.mark.parametrize(("output", "code"), [(">/dev/full", 2), (">&-", 2), ("2>&-", 2)])
def test_an_output_that_takes_nothing_ends_in_no_traceback(output: str, code: int, tmp_path: Path) -> None:
    line = f"{shlex.quote(sys.executable)} -m sensitivity rank nowhere --json {output}"
    ran = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr
    assert "no study at nowhere" in ran.stderr + ran.stdout
