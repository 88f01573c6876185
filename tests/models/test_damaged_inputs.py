"""Models and data that are damaged in every way we know: refused in one sentence each, or taken for a good reason."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from few import few
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments.small import datasets
from experiments.small import models as published
from sensitivity.api.sweeping import grid, sweep
from sensitivity.measure.loop import check_runs
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.processors import load_processor
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.images import MAX_ASPECT, why_unusable
from sensitivity.tasks.table import task

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
SECONDS = 60  # for one case, beside other busy processes; alone each takes some hundredths
# whatever a writer, an editor or a broken disk may put in the place of a value
ODD: list[Any] = [None, True, -1, 0, 10**12, 1.5, "text", "", [], {}, [[]], "\ud800", float("inf")]


def named(value: Any) -> str:
    return repr(value)[:40].encode("ascii", "backslashreplace").decode()


@pytest.fixture(autouse=True)
def _no_case_hangs() -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail(f"no end after {SECONDS} seconds", pytrace=False)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sentence(action: Callable[[], object]) -> str:
    """What a damaged input is refused with."""
    with pytest.raises(UserError) as caught:
        action()
    return checked(caught.value)


def checked(error: UserError) -> str:
    said = str(error)
    assert "\n" not in said
    assert 20 < len(said) < 2000
    assert not re.search(r"Errno|Traceback|a defect|object at 0x", said), said
    said.encode()  # it can be printed
    return said


def refused_or(action: Callable[[], object]) -> str | None:
    """The sentence of a refusal; None where the input is taken."""
    try:
        action()
    except UserError as error:
        return checked(error)
    return None


# -- a user's own lines

LINE: dict[str, Any] = {"image": "a.png", "prompt": "What is this?", "answers": ["a cat"]}
BOXED: dict[str, Any] = {"image": "a.png", "prompt": "Where is it?", "boxes": [[2, 1, 6, 5]]}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    datasets.picture(folder / "a.png")
    return folder


def asked(folder: Path, content: bytes | str | dict[str, Any], scorer: str = "exact") -> Any:
    text = json.dumps(content) if isinstance(content, dict) else content
    (folder / "q.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return task(f"{scorer}:{folder / 'q.jsonl'}")


# what of ODD is taken in which field of a line, and what it then means
TAKEN: dict[str, dict[str, str]] = {
    "prompt": {"'text'": "a prompt"},
    "answers": {"'text'": "one answer"},
    "id": {
        "None": "no id of its own",
        "-1": "a number is a name",
        "0": "a number is a name",
        "1000000000000": "a number is a name",
        "'text'": "a name",
    },
    "kind": {"None": "no kind of its own", "'text'": "a kind"},
    "split": {"None": "the evaluation split"},
    "note": {named(value): "nobody reads it" for value in ODD},
    "image": {},
    "boxes": {},
}


@pytest.mark.parametrize("value", ODD, ids=named)
@pytest.mark.parametrize("field", TAKEN)
def test_a_value_of_the_wrong_type_in_a_line(own: Path, field: str, value: Any) -> None:
    line, scorer = (BOXED, "iou") if field == "boxes" else (LINE, "exact")
    if named(value) in TAKEN[field]:
        found = asked(own, {**line, field: value}, scorer)
        assert len(found.examples) == 1
        example = found.examples[0]
        assert all(isinstance(one, str) for one in (example.id, example.kind, example.prompt, *example.answers))
    else:
        said = sentence(lambda: asked(own, {**line, field: value}, scorer))
        if field != "image" or not isinstance(value, str) or not value.isascii() or not value:
            assert f"line 1 lacks {field}" in said or f"line 1: {field} is " in said, said
            assert "each line is like" in said
        else:
            assert "no image file" in said


@pytest.mark.parametrize("value", [*ODD, ["a", 5], ["a", None], ["a", ["b"]], {"a": 1}, ["  "]], ids=named)
def test_answers_are_text_and_never_what_python_calls_a_value(own: Path, value: Any) -> None:
    if value == "text":
        assert asked(own, {**LINE, "answers": value}).examples[0].answers == ("text",)
    else:
        assert re.search(
            "lacks answers|answers is |empty answer", sentence(lambda: asked(own, {**LINE, "answers": value}))
        )


WRONG_BOXES: dict[str, Any] = {
    "a number": 5,
    "text": "1 2 3 4",
    "no list of lists": [2, 1, 6, 5],
    "nothing inside": [[]],
    "one number": [[2]],
    "two numbers": [[2, 1]],
    "three numbers": [[2, 1, 6]],
    "five numbers": [[2, 1, 6, 5, 3]],
    "text inside": [["2", "1", "6", "5"]],
    "null inside": [[2, 1, None, 5]],
    "true inside": [[True, 1, 6, 5]],
    "infinite": [[2, 1, float("inf"), 5]],
    "huge": [[2, 1, 10**400, 5]],
    "far away": [[2, 1, 10**12, 5]],
    "one corner": [[[2, 1]]],
    "two corners": [[[2, 1], [6, 5]]],
    "corners of three": [[[2, 1, 0], [6, 1, 0], [6, 5, 0]]],
    "corners and numbers": [[2, 1, [6, 5], 4]],
    "an object": [{"x1": 2, "y1": 1, "x2": 6, "y2": 5}],
    "an object around": {"boxes": [[2, 1, 6, 5]]},
    "a good and a bad one": [[2, 1, 6, 5], [2, 1, 6]],
    "no height": [[2, 1, 6, 1]],
    "a line of corners": [[[1, 1], [2, 2], [3, 3]]],
    "deep": [[[[2, 1], [6, 1]], [6, 5]]],
    "beside the image": [[20, 20, 30, 30]],
    "above the image": [[1, -9, 5, -2]],
    "too many corners": [[[i, i * i] for i in range(2000)]],
}


@pytest.mark.parametrize("kind", WRONG_BOXES)
def test_boxes_of_the_wrong_shape(own: Path, kind: str) -> None:
    said = sentence(lambda: asked(own, {**BOXED, "boxes": WRONG_BOXES[kind]}, "iou"))
    assert re.search("boxes is |box without an area|box outside of its image, which is 8 by 6|not JSON", said)
    assert "in pixels" in said


@pytest.mark.parametrize(
    "boxes", [[[2, 1, 6, 5]], [[2, 1, 6, 1, 6, 5]], [[[2, 1], [6, 1], [4, 5]]], [[-2, -2, 3, 3]], [[2.5, 1, 6, 5]]]
)
def test_boxes_of_every_right_shape(own: Path, boxes: Any) -> None:
    assert asked(own, {**BOXED, "boxes": boxes}, "iou").examples[0].answers[0].startswith("{<")


DEEP = "[" * 200_000
LINES: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "no evaluation lines"),
    "blank": ("\n  \n", "no evaluation lines"),
    "cut short": (json.dumps(LINE)[:-4], "line 1 is not JSON"),
    "two in a line": (json.dumps(LINE) * 2, "line 1 is not JSON"),
    "a list": (json.dumps([LINE]), "line 1 is .* instead of an object"),
    "text": ('"a.png"', "line 1 is .* instead of an object"),
    "a number": ("5", "line 1 is 5 instead of an object"),
    "null": ("null", "line 1 is null instead of an object"),
    "nested": (DEEP, "line 1 is not JSON .it is nested too deeply"),
    "nested in a field": (json.dumps(LINE)[:-1] + ', "more": ' + DEEP, "it is nested too deeply"),
    "NaN": (json.dumps(LINE)[:-1] + ', "id": NaN}', "NaN is not valid JSON"),
    "long number": (json.dumps(LINE)[:-1] + ', "id": ' + "9" * 5000 + "}", "too many digits"),
    "latin-1": (json.dumps({**LINE, "prompt": "café"}, ensure_ascii=False).encode("latin-1"), "not UTF-8"),
    "utf-16": (json.dumps(LINE).encode("utf-16"), "not UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8"),
    "zeros": (bytes(100), "line 1 is not JSON"),
    "the second line": (json.dumps(LINE) + "\n{", "line 2 is not JSON"),
    "the same id twice": (json.dumps({**LINE, "id": 1}) + "\n" + json.dumps({**LINE, "id": "1"}), "the id '1' twice"),
    "another split": (json.dumps({**LINE, "split": "test"}), "split is .* instead of one of evaluation, calibration"),
    "calibration alone": (json.dumps({**LINE, "split": "calibration"}), "no evaluation lines"),
    "a zero in a name": (json.dumps({**LINE, "image": "a\0.png"}), "image is .* instead of the name of a file"),
    "a name too long": (json.dumps({**LINE, "image": "a" * 5000}), "no image file"),
    "a prompt too long": (json.dumps({**LINE, "prompt": "a" * 1_000_001}), "prompt is"),
    "half a letter": (json.dumps({**LINE, "prompt": "\udc00"}), "prompt is"),
    "the folder itself": (json.dumps({**LINE, "image": "."}), "no image file: it is a folder"),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_that_are_no_lines(own: Path, kind: str) -> None:
    content, expected = LINES[kind]
    assert re.search(expected, sentence(lambda: asked(own, content)))


FINE: dict[str, bytes] = {
    "a byte-order mark": codecs.BOM_UTF8 + json.dumps(LINE).encode(),
    "a mark and an empty line": codecs.BOM_UTF8 + b"\n" + json.dumps(LINE).encode(),
    "line separators in a prompt": json.dumps({**LINE, "prompt": "a\u2028b\u2029c"}, ensure_ascii=False).encode(),
    "next line in a prompt": json.dumps({**LINE, "prompt": "a\u0085b"}, ensure_ascii=False).encode(),
    "Windows": json.dumps(LINE).encode() + b"\r\n\r\n",
    "white space around": b"\t " + json.dumps(LINE).encode() + b" \n",
    "one answer without a list": json.dumps({**LINE, "answers": "a cat"}).encode(),
    "letters of all kinds": json.dumps({**LINE, "prompt": "\U0001f600 \u4e2d \u202e?"}).encode(),
}


@pytest.mark.parametrize("kind", FINE)
def test_lines_that_were_wrongly_refused(own: Path, kind: str) -> None:
    (found,) = asked(own, FINE[kind]).examples
    whole = FINE[kind].removeprefix(codecs.BOM_UTF8).strip()
    assert found.prompt == json.loads(whole)["prompt"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_a_file_of_lines_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "q.jsonl"
    if kind == "folder":
        path.mkdir()  # is taken as a data set that `datasets` saved
    elif kind == "pipe":
        os.mkfifo(path)
    assert str(path) in sentence(lambda: task(str(path)))


# -- images

LENGTH = struct.Struct(">I")


def chunk(kind: bytes, content: bytes) -> bytes:
    return LENGTH.pack(len(content)) + kind + content + LENGTH.pack(zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A file that says how large it is, whatever is in it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def good() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def flipped() -> bytes:
    content = bytearray(good())
    content[len(content) // 2] ^= 255
    return bytes(content)


# name, content (None: something else than a file), why it is left out
IMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "a bomb": ("x.png", png(60_000, 60_000), "an image of more pixels than Pillow opens"),
    "a bomb as wide as can be": ("x.png", png(2**31 - 1, 2**31 - 1), "an image "),
    "a line of pixels": ("x.png", png(MAX_ASPECT + 1, 1), "an image far longer than wide"),
    "a column of pixels": ("x.png", png(1, 60_000), "an image far longer than wide"),
    "no width": ("x.png", png(0, 8), "an image that cannot be read"),
    "a wrong checksum": ("x.png", flipped(), "an image that cannot be read"),
    "cut short": ("x.png", good()[:-200], "a truncated image"),
    "a head alone": ("x.png", good()[:40], "a"),
    "empty": ("x.png", b"", "an image that cannot be read"),
    "text": ("x.png", b"no picture", "an image that cannot be read"),
    "a web page": ("x.png", b"<html><body>404</body></html>", "an image that cannot be read"),
    "SVG": ("x.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an image that cannot be read"),
    "a broken TIFF": ("x.png", b"II*\0" + b"\xff" * 60, "an image that cannot be read"),
    "a broken GIF": ("x.png", b"GIF89a" + b"\xff" * 60, "a"),
    "a broken JPEG": ("x.png", b"\xff\xd8\xff\xe0" + bytes(60), "a"),
    "a broken WebP": ("x.png", b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(60), "a"),
    "a broken BMP": ("x.png", b"BM" + b"\xff" * 60, "a"),
    "PostScript": ("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a"),
    "a folder": ("x.png", None, "no image file: it is a folder"),
    "a pipe": ("x.png", None, "no image file: it is a pipe or a device, not a file"),
    "a device": ("/dev/zero", None, "no image file: it is a pipe or a device, not a file"),
    "nothing": ("gone.png", None, "no image file"),
    "a link to nothing": ("x.png", None, "no image file"),
    "a link to itself": ("x.png", None, "no image file"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_one_bad_image_of_many_is_left_out_and_said(tmp_path: Path, kind: str) -> None:
    name, content, why = IMAGES[kind]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to("gone")
    elif kind == "a link to itself":
        path.symlink_to(name)
    for i in range(60):
        datasets.picture(tmp_path / f"{i}.png")
    lines = [{**LINE, "image": f"{i}.png"} for i in range(60)]
    datasets.write(tmp_path / "q.jsonl", [*lines[:30], {**LINE, "image": name}, *lines[30:]])
    found = task(str(tmp_path / "q.jsonl"))
    assert len(found.examples) == 60
    assert re.search(f"1 of 61 examples left out: {why}.* .line-000031: {path.name}", found.notes[0])
    datasets.write(tmp_path / "q.jsonl", [*lines[:30], {**LINE, "image": name}])
    assert "at most 2 % may be left out" in sentence(lambda: task(str(tmp_path / "q.jsonl")))


def test_a_large_picture_is_none_of_those(tmp_path: Path) -> None:
    Image.new("L", (10_000, 9_500)).save(tmp_path / "a.png")  # satellites take such, and Pillow warns of them
    assert why_unusable(tmp_path / "a.png") is None


# -- published data sets in their layouts: every value of an entry, by each odd one

ENTRIES: dict[str, list[tuple[str, tuple[str | int, ...]]]] = {
    "coco-captions": [
        ("annotations/captions_val2017.json", ("images", 0)),
        ("annotations/captions_val2017.json", ("annotations", 0)),
    ],
    "vqav2": [
        ("v2_OpenEnded_mscoco_val2014_questions.json", ("questions", 0)),
        ("v2_mscoco_val2014_annotations.json", ("annotations", 0)),
        ("v2_mscoco_val2014_annotations.json", ("annotations", 0, "answers", 0)),
    ],
    "gqa": [("testdev_balanced_questions.json", ("200000",)), ("testdev_balanced_questions.json", ("200000", "types"))],
    "rsvqa-lrben": [("LR_split_test_questions.json", ("questions", 1)), ("LR_split_test_answers.json", ("answers", 1))],
    "geochat-grounding": [("referring.jsonl", (0,))],
    "geochat-region-captions": [("region_captioning.jsonl", (0,))],
    "flickr30k": [
        ("dataset_flickr30k.json", ("images", 0)),
        ("dataset_flickr30k.json", ("images", 0, "sentences", 0)),
    ],
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets, "COUNT", 16)
        for name in ENTRIES:
            datasets.WRITE[name](folder / name)
    return folder


def at(data: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        data = data[step]
    return data


def with_json(file: Path, change: Callable[[Any], None]) -> Callable[[], None]:
    """Change a file of JSON, or of lines of it; gives back what mends it."""
    text = file.read_text(encoding="utf-8")
    lines = file.suffix == ".jsonl"
    data = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    change(data)
    file.write_text("\n".join(map(json.dumps, data)) if lines else json.dumps(data), encoding="utf-8")
    return lambda: file.write_text(text, encoding="utf-8") and None


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_the_wrong_type_in_a_layout(layouts: Path, name: str) -> None:
    """Each is refused, left out and said, or makes no difference to any example, which is then as it was."""
    plain = {example.id: example for example in task(f"{name}:{layouts / name}").examples}
    tried = 0
    for file, path in ENTRIES[name]:
        entry = at(json.loads((layouts / name / file).read_text()) if not file.endswith("l") else [
            json.loads(line) for line in (layouts / name / file).read_text().splitlines()
        ], path)  # fmt: skip
        for field in (*entry, None):  # None: the entry itself
            for value in ODD:

                def change(data: Any, path: Any = path, field: Any = field, value: Any = value) -> None:
                    inside, key = (at(data, path), field) if field is not None else (at(data, path[:-1]), path[-1])
                    inside[key] = value

                mend = with_json(layouts / name / file, change)
                try:
                    found = task(f"{name}:{layouts / name}")
                except UserError as error:
                    said = checked(error)
                    assert name in said or file in said
                    assert "official layout" in said or "left out" in said or "JSON" in said or "twice" in said, said
                    found = None
                finally:
                    mend()
                tried += 1
                if found is None:
                    continue
                for example in found.examples:
                    strings = (example.id, example.kind, example.prompt, *example.answers)
                    assert all(isinstance(one, str) and "None" not in one and "[]" not in one for one in strings)
                same = {one.id for one in found.examples if one.id in plain and one.answers == plain[one.id].answers}
                assert len(same) >= len(plain) - 6, (field, value)  # nothing else than this entry is touched
    assert tried >= 30


FILES: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "as JSON|layout|no .* examples"),
    "nested": (b'{"questions": ' + b"[" * 200_000, "as JSON|layout"),
    "a list": (b"[]", "layout"),
    "a number": (b"5", "layout"),
    "null": (b"null", "layout"),
    "a number inside": (b'{"questions": 5, "images": 5, "annotations": 5}', "layout|as JSON"),
    "utf-16": ("{}".encode("utf-16"), "as JSON|layout"),
    "NaN": (b'{"images": NaN, "annotations": [], "questions": [NaN]}', "as JSON|layout"),
    "a folder": (None, "it is a folder"),
    "a pipe": (None, "pipe or a device"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["coco-captions", "vqav2", "gqa"])
def test_files_of_a_layout_that_are_something_else(layouts: Path, name: str, kind: str) -> None:
    file, (content, expected) = layouts / name / ENTRIES[name][0][0], FILES[kind]
    aside = file.rename(file.with_suffix(".aside"))
    try:
        if content is not None:
            file.write_bytes(content)
        elif kind == "a folder":
            file.mkdir()
        else:
            os.mkfifo(file)
        said = sentence(lambda: task(f"{name}:{layouts / name}"))
        assert re.search(expected, said)
        assert "download" in said
    finally:
        file.rmdir() if file.is_dir() else file.unlink()
        aside.rename(file)


def test_a_layout_with_a_byte_order_mark_is_as_good(layouts: Path) -> None:
    for name in ("coco-captions", "vqav2", "geochat-grounding"):
        file = layouts / name / ENTRIES[name][0][0]
        whole = file.read_bytes()
        file.write_bytes(codecs.BOM_UTF8 + whole)
        assert len(task(f"{name}:{layouts / name}").examples) > 5
        file.write_bytes(whole)


# -- models


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_vlms.save("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "llava"))


def first_look(folder: Path, loaded: VLM | None = None) -> None:
    """As far as a sweep goes before it writes anything; of a loaded model, the processor alone is read again."""
    vlm = loaded or load(str(folder))
    if loaded:
        vlm = replace(loaded, processor=load_processor(folder, str(folder), loaded.model.config))
    check_runs(vlm, [task("vqa", n=1)])


# files of a model, and what each is damaged by; all are read before a weight is
OTHERS: dict[str, bytes | None] = {
    "empty": b"",
    "text": b"no JSON",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "cut short": b'{"model_type": "llava", ',
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "zeros": bytes(64),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "a folder": None,
    "a pipe": None,
}
MODEL_FILES = [
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "model.safetensors.index.json", "model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("file", MODEL_FILES)
def test_files_of_a_model_that_are_something_else(folder: Path, file: str, kind: str) -> None:
    path, content = folder / file, OTHERS[kind]
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    elif kind == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    said = sentence(lambda: load(str(folder)))
    assert file in said
    assert "fetch it again" in said


@pytest.mark.parametrize("kind", ["empty", "text", "a list", "nested", "zeros", "a folder"])
def test_a_tokenizer_that_is_something_else(folder: Path, kind: str) -> None:
    content = OTHERS[kind]
    (folder / "tokenizer.json").unlink()
    if content is None:
        (folder / "tokenizer.json").mkdir()
    else:
        (folder / "tokenizer.json").write_bytes(content)
    assert "processor of" in sentence(lambda: load(str(folder)))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield from leaves(below, (*path, key))


def damaged(file: Path, path: tuple[str | int, ...], value: Any) -> Callable[[], None]:
    def change(data: Any) -> None:
        at(data, path[:-1])[path[-1]] = value

    return with_json(file, change)


@pytest.mark.parametrize("share", few([1, 3], [3]))
def test_every_value_of_a_config_by_every_odd_one(kept: Path, share: int) -> None:
    """No weights are read; what is taken still has every linear layer in its place, or is refused.

    Of every value, each third odd one in turn; `make slow` takes all of them.
    """
    file, taken, refused = kept / "config.json", 0, 0
    pairs = itertools.product(enumerate(leaves(json.loads(file.read_text()))), enumerate(ODD))
    for path, value in [(path, value) for (i, path), (j, value) in pairs if (i + j) % share == 0]:
        mend = damaged(file, path, value)
        try:
            said = refused_or(lambda: inspect(str(kept)))
        finally:
            mend()
        taken, refused = taken + (said is None), refused + (said is not None)
        assert said is None or "llava" in said
    assert refused > 300 / share
    assert taken < refused


# of a config that is right in each of its words: what the stored weights, or the tokenizer, do not bear out
UNFIT: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "no language model": (("text_config",), {"model_type": "llama"}, "another shape than its config says"),
    "no vision tower": (("vision_config",), {"model_type": "clip_vision_model"}, "another shape than its config says"),
    "more words": (("text_config", "vocab_size"), 10**7, "another shape than its config says"),
    "fewer words": (("text_config", "vocab_size"), 9, "another shape than its config says"),
    "wider": (("text_config", "hidden_size"), 8192, "another shape|cannot be built|does not fit"),
    "wide beyond all": (("text_config", "intermediate_size"), 10**12, "another shape|cannot be built"),
    "more blocks": (("text_config", "num_hidden_layers"), 7, "lacks tensors"),
    "fewer blocks": (("text_config", "num_hidden_layers"), 2, "has unknown tensors"),
    "endless blocks": (("text_config", "num_hidden_layers"), 10**9, "num_hidden_layers is 1000000000, and 1,000"),
    "endless blocks of vision": (("vision_config", "num_hidden_layers"), 10**6, "and 1,000 is the most"),
    "other heads": (("text_config", "num_key_value_heads"), 2, "another shape than its config says"),
    "larger pictures": (("vision_config", "image_size"), 10**6, "another shape than its config says"),
    "larger patches": (("vision_config", "patch_size"), 4, "another shape than its config says"),
    "another family": (("model_type",), "siglip", "llava"),
    "a text model": (("architectures",), ["LlamaForCausalLM"], "llava"),
    "a class without a model": (("architectures",), ["GenerationConfig"], ""),
    "five architectures": (("architectures",), 5, "architectures is 5 instead of a list of text"),
    "a list of five": (("architectures",), [5], "architectures is .5. instead of a list of text"),
    "no model type": (("model_type",), [], "model_type is .. instead of text"),
    "quantized by text": (("quantization_config",), "gptq", 'quantization_config is "gptq" instead of an object'),
    "quantized by nothing known": (("quantization_config",), {}, "already quantized .by an unnamed method"),
    "odd numbers": (("dtype",), "int8", "dtype is"),
    "numbers in a list": (("dtype",), ["float16"], "dtype is"),
    "another image word": (("image_token_index",), 3, "image"),
    "an image word beyond": (("image_token_index",), 10**12, "no token|image"),
    "a negative image word": (("image_token_index",), -1, "no token|image"),
    "no such block": (("vision_feature_layer",), 400, "cannot be run on the first example"),
    "a block beyond": (("vision_feature_layer",), 10**12, "vision_feature_layer is"),
    "heads that do not divide": (("vision_config", "num_attention_heads"), 3, "llava"),
    "negative heads": (("vision_config", "num_attention_heads"), -1, "llava"),
    "code of its own": (("model_type",), "secret", "not known to transformers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_a_config_that_the_weights_do_not_bear_out(folder: Path, kind: str) -> None:
    path, value, expected = UNFIT[kind]
    damaged(folder / "config.json", path, value)
    if expected:
        assert re.search(expected, sentence(lambda: first_look(folder)))
    else:
        first_look(folder)  # no class of a model is as good as none: the one of its model_type


def test_no_memory_is_taken_for_weights_that_are_not_there(folder: Path) -> None:
    """A language model of 7B parameters is what transformers takes where the config names none."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read where Linux says it")

    def most() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) >> 10

    before = most()
    with_json(folder / "config.json", lambda config: config.pop("text_config"))
    assert "another shape than its config says" in sentence(lambda: load(str(folder)))
    assert most() - before < 1000  # MB, of 27,000


NARROW = [
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
HALF_NARROW = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("every", [True, False], ids=["all", "one"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weights_that_are_no_full_precision_are_not_taken_for_it(folder: Path, dtype: torch.dtype, every: bool) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (one,) = [key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight")]
    for key in list(tensors) if every else [one]:
        tensors[key] = tensors[key].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    said = sentence(lambda: load(str(folder)))
    assert f"as {str(dtype).removeprefix('torch.')}, and its config.json has no quantization_config" in said
    assert str(folder) in said


def headed(header: bytes, content: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + content


def tensor(name: str, dtype: str, shape: list[Any], *ends: Any) -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": ends}}).encode()


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a length of nothing": bytes(8),
    "a length beyond all": b"\xff" * 8 + b"{}",
    "longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "nested": headed(b"[" * 200_000),
    "nested objects": headed(b'{"a":' * 200_000),
    "no JSON": headed(b"pickle"),
    "a list": headed(b"[]"),
    "a tensor that is a number": headed(b'{"a": 5}'),
    "no type": headed(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', b"1234"),
    "an unknown type": headed(tensor("a", "Q9", [1], 0, 4), b"1234"),
    "four bits": headed(tensor("a", "F4", [2], 0, 1), b"1"),
    "a negative shape": headed(tensor("a", "F32", [-1], 0, 4), b"1234"),
    "a shape beyond all": headed(tensor("a", "F32", [2**62, 2**62], 0, 4), b"1234"),
    "a shape of text": headed(tensor("a", "F32", ["one"], 0, 4), b"1234"),
    "a shape that is too small": headed(tensor("a", "F32", [1], 0, 8), b"12345678"),
    "ends in the wrong order": headed(tensor("a", "F32", [1], 4, 0), b"1234"),
    "ends beyond the file": headed(tensor("a", "F32", [2], 0, 8), b"1234"),
    "ends of text": headed(tensor("a", "F32", [1], "0", "4"), b"1234"),
    "a hole": headed(tensor("a", "F32", [1], 4, 8), b"12345678"),
    "bytes behind": headed(tensor("a", "F32", [1], 0, 4), b"123456"),
    "metadata of the wrong type": headed(b'{"__metadata__": {"a": 5}}'),
    "a zip": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_is_damaged(folder: Path, kind: str) -> None:
    (folder / "model.safetensors").write_bytes(HEADERS[kind])
    said = sentence(lambda: load(str(folder)))
    assert "model.safetensors is not a complete safetensors file (" in said or "numbers of the type F4" in said


INDEXES: dict[str, Any] = {
    "no map": {},
    "a map of text": {"weight_map": "model.safetensors"},
    "a map in a list": {"weight_map": [["a", "model.safetensors"]]},
    "null": {"weight_map": None},
    "a shard that is a number": {"weight_map": {"a": 5}},
    "a shard that is a list": {"weight_map": {"a": ["model.safetensors"]}},
    "a shard without a name": {"weight_map": {"a": ""}},
    "a shard that is the folder": {"weight_map": {"a": "."}},
    "a shard above": {"weight_map": {"a": "../model.safetensors"}},
    "a shard anywhere": {"weight_map": {"a": "/dev/zero"}},
    "a shard that is not there": {"weight_map": {"a": "gone.safetensors"}},
    "a shard with a zero in it": {"weight_map": {"a": "a\0b"}},
    "a shard too long": {"weight_map": {"a": "a" * 5000}},
    "a shard that is a config": {"weight_map": {"a": "config.json"}},
    "no shard": {"weight_map": {}},
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_damaged(folder: Path, kind: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEXES[kind]))
    said = sentence(lambda: load(str(folder)))
    assert re.search("index|not a complete safetensors file|lacks", said)


# -- processors


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_every_value_of_a_processor_by_every_odd_one(kept: Path, name: str) -> None:
    """Each is refused, or a picture still becomes what the model takes: a forward pass says so."""
    vlm, refused, tried = load(str(kept)), 0, 0
    for path in list(leaves(json.loads((kept / name).read_text()))):
        for value in (None, -1, 10**12, "text", []):
            mend = damaged(kept / name, path, value)
            try:
                said = refused_or(lambda: first_look(kept, vlm))
            finally:
                mend()
            tried, refused = tried + 1, refused + (said is not None)
    assert refused > tried // 4


def square(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


SIZES: dict[str, tuple[str, dict[str, Any], str]] = {
    "larger pictures": ("preprocessor_config.json", square(32), "run"),
    "smaller pictures": ("preprocessor_config.json", square(8), "run"),
    "pictures that are not square": ("preprocessor_config.json", {"crop_size": {"height": 16, "width": 32}}, "run"),
    "no crop": ("preprocessor_config.json", {"do_center_crop": False, "size": {"height": 16, "width": 24}}, "run"),
    "pictures beyond all": ("preprocessor_config.json", {"size": {"shortest_edge": 10**9}}, "0 to 8,192 is possible"),
    "negative pictures": ("preprocessor_config.json", {"size": {"shortest_edge": -16}}, "0 to 8,192 is possible"),
    "a crop beyond all": ("preprocessor_config.json", {"crop_size": {"height": 10**6, "width": 10**6}}, "is possible"),
    "no pictures": ("preprocessor_config.json", {"size": {"shortest_edge": 0}}, "processor of|run"),
    "no size": ("preprocessor_config.json", {"size": {}, "crop_size": {}}, "processor of|run"),
    "one mean": ("preprocessor_config.json", {"image_mean": [0.5]}, "processor of|run"),
    "no deviation": ("preprocessor_config.json", {"image_std": ["a", "b", "c"]}, "processor of|run"),
    "smaller patches": ("processor_config.json", {"patch_size": 4}, "run"),
    "no patches": ("processor_config.json", {"patch_size": 0}, "processor of|run"),
    "tokens beyond all": ("processor_config.json", {"num_additional_image_tokens": 10**12}, "0 to 65,536 is possible"),
    "one token less": ("processor_config.json", {"num_additional_image_tokens": 0}, "run"),
    "another strategy": ("processor_config.json", {"vision_feature_select_strategy": "full"}, "run"),
    "no such strategy": ("processor_config.json", {"vision_feature_select_strategy": "some"}, "processor of|run"),
    "no such processor": ("processor_config.json", {"processor_class": "NoSuchProcessor"}, "processor|run"),
    "another processor": ("processor_config.json", {"processor_class": "Blip2Processor"}, "processor|run"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_a_processor_that_does_not_fit_the_model(folder: Path, kind: str) -> None:
    file, values, expected = SIZES[kind]
    with_json(folder / file, lambda data: data.update(values))
    assert re.search(expected, sentence(lambda: first_look(folder)))


TEMPLATES: dict[str, str] = {
    "cut short": "{% for message in messages %}",
    "no such function": "{{ nobody_defines_this() }}",
    "no such field": "{{ messages[7]['content'] }}",
    "raises": "{{ raise_exception('only one role') }}",
    "endless": "{% for i in range(1000000000) %}a{% endfor %}",
    "reaches out": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "divides by nothing": "{{ 1 / 0 }}",
    "no image": "{% for message in messages %}{{ message['content'][1]['text'] }}{% endfor %}",
    "two images": "<image><image>{{ messages[0]['content'][1]['text'] }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_broken_chat_template_leaves_no_study_behind(folder: Path, tmp_path: Path, kind: str) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind])
    vlm = load(str(folder))
    parts = inspect(vlm, by="part")
    said = sentence(lambda: sweep(vlm, parts, grid(parts, bits=(8,)), ["vqa"], tmp_path / "study", n=2))
    assert re.search("chat template of|processor of|cannot be run on the first example", said)
    assert not (tmp_path / "study").exists()


# -- adapters


@pytest.fixture(scope="module")
def adapter_kept(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    return saved_vlms.adapter(kept, tmp_path_factory.mktemp("adapters") / "lora")


@pytest.fixture
def lora(adapter_kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_kept, tmp_path / "lora"))


BASES: dict[str, tuple[Any, str]] = {
    "a number": (5, "base_model_name_or_path is 5 instead of the name of a file"),
    "a list": ([], "base_model_name_or_path is"),
    "an object": ({}, "base_model_name_or_path is"),
    "true": (True, "base_model_name_or_path is true"),
    "nothing": (None, "names no base model"),
    "no text": ("", "base_model_name_or_path is"),
    "a zero inside": ("a\0b", "base_model_name_or_path is"),
    "too long": ("a/" * 3000, "cannot be loaded"),
    "itself": (".", "is its own base model"),
    "itself by a longer way": ("../lora", "is its own base model"),
    "no folder": ("./nowhere/at/all", "cannot be loaded"),
}


@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_whose_base_is_none(lora: Path, kind: str) -> None:
    value, expected = BASES[kind]
    with_json(lora / "adapter_config.json", lambda data: data.update(base_model_name_or_path=value))
    for config_only in (True, False):
        assert re.search(expected, sentence(lambda only=config_only: load(str(lora), config_only=only)))


def test_adapters_in_a_circle(lora: Path, tmp_path: Path) -> None:
    other = shutil.copytree(lora, tmp_path / "other")
    with_json(lora / "adapter_config.json", lambda data: data.update(base_model_name_or_path=str(other)))
    with_json(other / "adapter_config.json", lambda data: data.update(base_model_name_or_path=str(lora)))
    assert "is its own base model" in sentence(lambda: load(str(lora)))
    assert "is its own base model" in sentence(lambda: load(f"{lora}@{lora}"))


ADAPTED: dict[str, tuple[dict[str, Any], str]] = {
    "a rank beyond all": ({"r": 10**9}, "has the rank 1000000000, and no stored tensor has a dim"),
    "a negative rank": ({"r": -2}, "has the rank -2"),
    "another rank": ({"r": 3}, "does not fit its base model"),
    "a rank of text": ({"r": "two"}, "does not fit its base model"),
    "no such kind": ({"peft_type": "NOSUCH"}, "does not fit its base model"),
    "a kind that is a number": ({"peft_type": 5}, "does not fit its base model"),
    "no such modules": ({"target_modules": ["nobody"]}, "does not fit its base model|has tensors for no layer"),
    "modules that are a number": ({"target_modules": 5}, "does not fit its base model|tensors"),
    "a rank of a layer beyond all": ({"rank_pattern": {"q_proj": 10**10}}, "has the rank 10000000000"),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_that_is_damaged(lora: Path, kind: str) -> None:
    values, expected = ADAPTED[kind]
    with_json(lora / "adapter_config.json", lambda data: data.update(values))
    assert re.search(expected, sentence(lambda: load(str(lora))))


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_an_adapter_that_are_something_else(lora: Path, kind: str) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        path, content = lora / file, OTHERS[kind]
        aside = path.rename(path.with_suffix(".aside"))
        if content is not None:
            path.write_bytes(content)
        elif kind == "a folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        assert file in sentence(lambda: load(str(lora)))
        path.rmdir() if path.is_dir() else path.unlink()
        aside.rename(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, None], ids=str)
def test_an_adapter_of_numbers_that_are_none(lora: Path, dtype: torch.dtype | None) -> None:
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: one * torch.nan if dtype is None else one.to(dtype) for key, one in tensors.items()}, file)
    said = sentence(lambda: load(str(lora)))
    assert ("cannot be merged" if dtype is None else "as whole numbers or in 8 bits") in said


# -- LLaVA's original layout


@pytest.fixture(scope="module")
def original_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.save("geochat", tmp_path_factory.mktemp("original") / "geochat")


@pytest.fixture
def original(original_kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_kept, tmp_path / "geochat"))


ORIGINAL: dict[str, dict[str, list[Any]]] = {
    "refused": {
        "vocab_size": [value for value in ODD if value is not True] + [10**9, "256", 255, 300],
        "mm_vision_tower": [*(value for value in ODD if value != "text"), "./nowhere/at/all"],
        "mm_projector_type": list(ODD),
        "rope_scaling": [5, "linear", [], {"type": 5}, {"type": "nosuch"}],
        "hidden_size": [None, -1, 0, 10**12, "text", [], {}],
        "num_hidden_layers": [-1, 10**12, "text", [], {}, 1.5],
        "torch_dtype": [5, "int8", [], "nosuch"],
    }
}


@pytest.mark.parametrize("field", ORIGINAL["refused"])
def test_a_config_in_the_original_layout_that_is_damaged(original_kept: Path, field: str) -> None:
    file = original_kept / "config.json"
    for value in ORIGINAL["refused"][field]:
        mend = damaged(file, (field,), value)
        try:
            assert "geochat" in sentence(lambda: load(str(original_kept))), value
        finally:
            mend()


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_in_the_original_layout_that_lacks_a_size(original: Path, field: str) -> None:
    with_json(original / "config.json", lambda data: data.pop(field))
    assert "geochat" in sentence(lambda: load(str(original)))


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_of_pickles_that_is_damaged(original: Path, kind: str) -> None:
    saved_vlms.in_pickles(original)
    (original / "pytorch_model.bin.index.json").write_text(json.dumps(INDEXES[kind]))
    sentence(lambda: load(str(original)))


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_the_original_layout_that_are_something_else(original: Path, kind: str) -> None:
    (original / "model.safetensors").unlink()
    for file in ("pytorch_model.bin.index.json", "pytorch_model.bin"):
        path, content = original / file, OTHERS[kind]
        if content is not None:
            path.write_bytes(content)
        elif kind == "a folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        assert file in sentence(lambda: load(str(original)))
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "content", [5, [torch.zeros(1)], {"a": 5}, {5: torch.zeros(1)}, {"a": {"b": torch.zeros(1)}}, {}], ids=str
)
def test_a_pickle_of_other_things(original: Path, content: Any) -> None:
    (original / "model.safetensors").unlink()
    torch.save(content, original / "pytorch_model.bin")
    assert re.search("pytorch_model.bin|lacks tensors|tower", sentence(lambda: load(str(original))))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weights_in_the_original_layout_that_are_no_full_precision(original: Path, dtype: torch.dtype) -> None:
    file = original / "model.safetensors"
    save_file({key: one.to(dtype) for key, one in load_file(file).items()}, file)
    assert "no quantization_config" in sentence(lambda: load(str(original)))
