"""Invented data sets of COUNT plain images each, in the official layouts of the published ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from sensitivity.tasks.datasets import geochat

COUNT = 120  # images in each; above 2 % missing a data set is refused: two may be missing, three are too many
KINDS = {".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF"}


def picture(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Image.new("RGB", size, (90, 120, 60)).save(stream, KINDS[path.suffix])
    path.write_bytes(stream.getvalue())
    return path


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, data)) if lines else json.dumps(data), encoding="utf-8")


def coco(folder: Path, part: str = "val2017", first: int = 100) -> None:
    images = [{"id": first + i, "file_name": f"{first + i:012d}.jpg", "height": 6, "width": 8} for i in range(COUNT)]
    captions = [
        {"id": 10 * one["id"] + j, "image_id": one["id"], "caption": f"A cat number {one['id']}, view {j}. "}
        for one in images
        for j in range(5)
    ]
    write(folder / f"annotations/captions_{part}.json", {"info": {}, "images": images, "annotations": captions})
    for one in images:
        picture(folder / part / str(one["file_name"]))


def flickr(folder: Path) -> None:
    images = []
    for i in range(COUNT):
        picture(folder / "flickr30k-images" / f"{i:04d}.jpg")
        sentences = [{"raw": f"Caption {j} of {i} .", "tokens": [], "sentid": 5 * i + j} for j in range(5)]
        images.append(
            {"filename": f"{i:04d}.jpg", "imgid": i, "split": ("test", "train", "val")[i % 3], "sentences": sentences}
        )
    write(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def vqav2(folder: Path, part: str = "val2014", first: int = 100) -> None:
    asked, said = [], []
    for image in range(first, first + COUNT):
        picture(folder / part / f"COCO_{part}_{image:012d}.jpg")
        for j in range(2):
            name = image * 1000 + j
            asked.append({"image_id": image, "question": "Is it a cat?", "question_id": name})
            people = ["no"] * 3 + ["yes"] * 6 + ["maybe"]
            said.append({"question_id": name, "image_id": image, "answer_type": "yes/no", "question_type": "is it a",
                         "multiple_choice_answer": "yes",
                         "answers": [{"answer": a, "answer_id": k + 1} for k, a in enumerate(people)]})  # fmt: skip
    write(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": asked, "data_subtype": part})
    write(folder / f"v2_mscoco_{part}_annotations.json", {"annotations": said, "data_subtype": part})


def gqa(folder: Path, part: str = "testdev", first: int = 0) -> None:
    found = {}
    for i in range(first, first + COUNT):
        picture(folder / "images" / f"n{i}.jpg")
        found[f"20{i:04d}"] = {"imageId": f"n{i}", "question": "Is it red?", "answer": "no", "isBalanced": True,
                               "types": {"structural": "verify", "semantic": "attr"}}  # fmt: skip
    write(folder / f"{part}_balanced_questions.json", found)


def rsvqa(folder: Path, prefix: str, images: str, first: int = 0) -> None:
    asked: list[dict[str, Any]] = [{"id": 99999, "active": False}]
    said: list[dict[str, Any]] = [{"id": 99999, "active": False}]
    for image in range(first, first + COUNT):
        picture(folder / images / f"{image}.tif")
        for j, kind in enumerate(("presence", "comp", "rural_urban", "count")):
            name = image * 10 + j
            about = {"img_id": image, "type": kind, "question": f"{kind}?", "answers_ids": [name]}
            asked.append({"id": name, **about, "active": True})
            answer = {"rural_urban": "rural", "count": "3"}.get(kind, "yes")
            said.append({"id": name, "question_id": name, "answer": answer, "active": True})
    write(folder / f"{prefix}_questions.json", {"questions": asked})
    write(folder / f"{prefix}_answers.json", {"answers": said})


def scenes(folder: Path, suffix: str) -> None:
    for name in ("Airport", "BareLand", "Beach"):
        for i in range(COUNT // 3):
            picture(folder / name / f"{name.lower()}_{i}{suffix}")


def bench(folder: Path, file: str) -> None:
    lines = []
    for i in range(COUNT):
        picture(folder / "images" / f"P{i:04d}.png", (60, 40))
        box = [[6, 4], [30, 4], [30, 20], [6, 20]]
        kind = ("ref", "grounding")[i % 2]
        right: Any = [box] if kind == "ref" else [box, [[40.0, 20.0], [50.0, 20.0], [50.0, 30.0], [40.0, 30.0]]]
        question = " the large ship "
        if file == geochat.REGIONS:
            right, question = "a large ship", "{<10><10><50><50>|<0>}"
        lines.append({"image_id": f"P{i:04d}", "question": question, "ground_truth": right, "type": kind,
                      "dataset": "SOTA", "question_id": i % 7, "obj_ids": [0], "size_group": "small"})  # fmt: skip
    write(folder / file, lines)


def pairs(folder: Path, part: str = "test", first: int = 0) -> None:
    for i in range(first, first + COUNT):
        for when in "AB":
            picture(folder / part / when / f"{part}_{i}.png")
        mask = Image.new("L", (8, 6))
        mask.putpixel((3, 3), 255 * (i % 2))
        (folder / part / "label").mkdir(parents=True, exist_ok=True)
        mask.save(folder / part / "label" / f"{part}_{i}.png")


def described_pairs(folder: Path) -> None:
    listed = []
    for i in range(COUNT):
        name = f"test_{i:06d}.png"
        for when in "AB":
            picture(folder / "images" / "test" / when / name)
        said = [{"raw": f" a house number {i} has been built , view {j} .", "tokens": []} for j in range(5)]
        listed.append({"filepath": "test", "filename": name, "split": "test", "imgid": i, "changeflag": i % 2,
                       "sentences": said})  # fmt: skip
    write(folder / "LevirCCcaptions.json", {"images": listed, "dataset": "LEVIR-CC"})


def disasters(folder: Path, part: str = "test", first: int = 0) -> None:
    subtypes = ("no-damage", "minor-damage", "major-damage", "destroyed", "un-classified")
    for i in range(first, first + COUNT):
        name = f"socal-fire_{i:08d}"
        for when in ("pre", "post"):
            picture(folder / part / "images" / f"{name}_{when}_disaster.png")
        hit = [{"properties": {"feature_type": "building", "subtype": one}, "wkt": ""} for one in subtypes[: i % 4 + 1]]
        about = {"features": {"lng_lat": [], "xy": hit}, "metadata": {"disaster": "socal-fire"}}
        write(folder / part / "labels" / f"{name}_post_disaster.json", about)


WRITE: dict[str, Callable[[Path], None]] = {
    "coco-captions": coco,
    "vqav2": vqav2,
    "gqa": gqa,
    "rsvqa-lrben": lambda folder: rsvqa(folder, "LR_split_test", "Images_LR"),
    "rsvqa-hrben": lambda folder: rsvqa(folder, "USGS_split_test_phili", "Data"),
    "aid": lambda folder: scenes(folder, ".jpg"),
    "ucmerced": lambda folder: scenes(folder / "Images", ".tif"),
    "geochat-grounding": lambda folder: bench(folder, geochat.REFERRING),
    "geochat-region-captions": lambda folder: bench(folder, geochat.REGIONS),
    "levir-cd": pairs,
    "levir-cc": described_pairs,
    "xbd": disasters,
    "flickr30k": flickr,
}
