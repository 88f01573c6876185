"""A line about a video: the frames that the model sees, the splits, and what is said where it cannot be read."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
from PIL import Image

from sensitivity.measure.evaluation import evaluate
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples import videos
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

decoder = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="no decoder of videos here: pip install 'vlm-sensitivity[video]'"
)
SECONDS, RATE = 4, 10


def film(file: Path, frames: int = SECONDS * RATE, codec: str = "mpeg4", every: int = 12) -> None:
    """A video whose brightness says when: frame i is gray of value 6 i."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"g": str(every)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(frames):
            gray = np.full((48, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())


def lines(folder: Path, *every: dict[str, Any]) -> str:
    asked = [{"prompt": "what happens?", "answers": ["a fall"], **line} for line in every]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return str(folder / "q.jsonl")


def shown(example: Example) -> list[float]:
    """The frames that are seen, told by their brightness."""
    return [float(np.asarray(Image.open(io.BytesIO(one.read_bytes()))).mean()) / 6 for one in example.images]  # type: ignore[union-attr]


@decoder
@pytest.mark.parametrize(("name", "every"), [("a.mp4", 12), ("a.mkv", 100), ("a.avi", 1)])
def test_the_frames_are_those_in_the_middle_of_equal_parts(name: str, every: int, tmp_path: Path) -> None:
    """Whatever the container, and however far apart the frames are that need no other."""
    film(tmp_path / name, every=every)
    found = task(lines(tmp_path, {"video": name, "frames": 4}, {"video": name}, {"video": name, "frames": 1}))
    expected = [[5, 15, 25, 35], [2, 7, 12, 17, 22, 27, 32, 37], [20]]
    for example, frames in zip(found.examples, expected, strict=True):
        assert shown(example) == pytest.approx(frames, abs=0.45)
    assert "a video is shown as 1 or 4 or 8 frames, the middle ones of equally long parts" in found.notes[-1]
    before = found.fingerprint
    film(tmp_path / name, frames=20)
    videos._frames.cache_clear()
    assert task(str(tmp_path / "q.jsonl")).fingerprint != before


@decoder
def test_a_model_sees_the_frames_as_images_in_their_order(tmp_path: Path) -> None:
    """The answer to a video is the answer to the list of its frames, saved as files."""
    film(tmp_path / "a.mp4")
    (example,) = task(lines(tmp_path, {"video": "a.mp4", "frames": 3})).examples
    for number, frame in enumerate(example.images):
        Image.open(io.BytesIO(frame.read_bytes())).save(tmp_path / f"{number}.png")  # type: ignore[union-attr]
    vlm = load(str(saved_vlms.save("smolvlm", tmp_path / "m")))
    as_images = {"image": ["0.png", "1.png", "2.png"], "id": "images"}
    rows = evaluate(vlm, task(lines(tmp_path, {"video": "a.mp4", "frames": 3, "id": "video"}, as_images)), plain=True)
    first, second = rows["nll"]
    assert first == pytest.approx(second, abs=1e-6)
    reversed_images = {"image": ["2.png", "1.png", "0.png"]}
    (other,) = evaluate(vlm, task(lines(tmp_path, reversed_images)), plain=True)["nll"]
    assert other != pytest.approx(first, abs=1e-6)


@decoder
def test_a_family_that_takes_one_image_takes_no_video_but_a_frame(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4")
    vlm = load(str(saved_vlms.save("blip2_opt", tmp_path / "m")))
    message = "no chat template, so that it cannot be asked about several images, such as the frames of a video,"
    with pytest.raises(UserError, match=message):
        evaluate(vlm, task(lines(tmp_path, {"video": "a.mp4"})))
    assert len(evaluate(vlm, task(lines(tmp_path, {"video": "a.mp4", "frames": 1})))["nll"]) == 1


@decoder
def test_videos_are_kept_for_calibration_as_images_are(tmp_path: Path) -> None:
    every = []
    for number in range(10):
        film(tmp_path / f"{number}.mp4", frames=8 + number)
        every += [{"video": f"{number}.mp4", "frames": 2, "id": f"{number} {i}"} for i in range(2)]
    file = lines(tmp_path, *every)
    evaluation, calibration = (task(file, split) for split in ("evaluation", "calibration"))
    assert len(calibration.examples) == 2
    assert len({one.cluster for one in calibration.examples}) == 1
    assert {one.cluster for one in evaluation.examples}.isdisjoint({one.cluster for one in calibration.examples})


@decoder
def test_videos_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    import av

    film(tmp_path / "whole.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "half.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for name, why in {
        "gone.mp4": "no video file (line-000001: gone.mp4)",
        "text.mp4": "a video that cannot be read",
        "half.mp4": "a video that cannot be read",
        "sound.mp4": "a video without pictures (it has sound only)",
    }.items():
        with pytest.raises(UserError) as error:
            task(lines(tmp_path, {"video": name}))
        assert f"1 of 1 examples left out: {why}" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"video": "a.mp4", "image": "a.png"}, "line 1 has a video and an image, too; a line about a video is like"),
        ({"image": "a.png", "frames": 8}, "line 1 has frames and no video; a line about a video is like"),
        ({"video": ["a.mp4"]}, "line 1: video is .* instead of"),
        ({"video": ""}, "line 1 lacks video"),
        ({"video": "a.mp4", "prompt": ""}, r"line 1 lacks prompt.*; a line about a video is like"),
        ({"video": "a.mp4", "frames": 0}, "line 1: frames is 0 instead of a whole number from 1 to 64"),
        ({"video": "a.mp4", "frames": True}, "line 1: frames is true instead of a whole number from 1 to 64"),
    ],
)
def test_lines_that_are_none(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        task(lines(tmp_path, line))


def test_boxes_are_those_of_one_image(tmp_path: Path) -> None:
    file = lines(tmp_path, {"video": "a.mp4", "boxes": [[1, 1, 2, 2]]})
    with pytest.raises(UserError, match="line 1 has a video and boxes, which are those of one image"):
        task(f"iou:{file}")


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a video needs the extra video; type pip install 'vlm-sensitivity\[video\]'"):
        task(lines(tmp_path, {"video": "a.mp4"}))
