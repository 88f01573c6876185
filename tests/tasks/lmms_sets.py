"""Small data sets in the exact layouts that lmms-eval's tasks read, about scenes that the embedded models know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

Row = dict[str, Any]


def asked(n: int) -> list[Example]:
    """Questions about scenes, two or three to an image, so that examples share images as in the real sets."""
    return list(task("vqa", n=n).examples)


def _chartqa(n: int) -> tuple[Row, list[Row]]:
    rows = [
        {
            "type": ("augmented_test", "human_test")[i % 2],
            "question": e.prompt,
            "answer": e.answers[0],
            "image": open_image(e.image),
        }
        for i, e in enumerate(asked(n))
    ]
    return {"type": "string", "question": "string", "answer": "string", "image": "image"}, rows


def _textvqa(n: int) -> tuple[Row, list[Row]]:
    columns = {
        "image_id": "string", "question_id": "int32", "question": "string", "question_tokens": ["string"],
        "image": "image", "image_width": "int32", "image_height": "int32",
        "flickr_original_url": "string", "flickr_300k_url": "string", "answers": ["string"],
        "image_classes": ["string"], "set_name": "string", "ocr_tokens": ["string"],
    }  # fmt: skip
    rows = []
    for i, e in enumerate(asked(n)):
        picture = open_image(e.image)
        # eight people agree, and two say something else, so that an answer can also score in between
        rows.append({
            "image_id": e.cluster, "question_id": i, "question": e.prompt, "question_tokens": e.prompt.split(),
            "image": picture, "image_width": picture.width, "image_height": picture.height, "flickr_original_url": "",
            "flickr_300k_url": "", "answers": [e.answers[0]] * 8 + ["three", "Two."], "image_classes": [],
            "set_name": "val", "ocr_tokens": [],
        })  # fmt: skip
    return columns, rows


def _mmmu(n: int) -> tuple[Row, list[Row]]:
    names = ("id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty", "question_type")
    columns = dict.fromkeys((*names, "subfield"), "string") | {f"image_{i}": "image" for i in range(1, 8)}
    rows = []
    pictures = asked(n + 1)
    for i, e in enumerate(pictures[:-1]):
        choice, two = i % 3 < 2, i % 3 == 1
        rows.append(dict.fromkeys(columns) | {
            "id": f"validation_{('Art', 'Physics', 'Music')[i % 3]}_{i}", "explanation": "", "img_type": "['Photo']",
            "question": f"<image 1> {e.prompt}" if not two else f"Compare <image 1> with <image 2>. {e.prompt}",
            "options": str([e.answers[0], "seven", "none"]) if choice else "[]",
            "answer": "A" if choice else e.answers[0],
            "topic_difficulty": "Easy", "question_type": "multiple-choice" if choice else "open",
            "subfield": "Counting", "image_1": open_image(e.image),
            **({"image_2": open_image(pictures[-1].image)} if two else {}),
        })  # fmt: skip
    return columns, rows


def _pope(n: int) -> tuple[Row, list[Row]]:
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    rows: list[Row] = []
    for e in asked(6 * n):
        if e.answers[0].lower() in ("yes", "no") and len(rows) < n:
            number = str(len(rows))
            rows.append({
                "id": number, "question_id": number, "question": e.prompt, "answer": e.answers[0].lower(),
                "image_source": e.cluster, "category": ("random", "popular", "adversarial")[len(rows) % 3],
                "image": open_image(e.image),
            })  # fmt: skip
    return dict.fromkeys(names, "string") | {"image": "image"}, rows


def _refcoco(n: int) -> tuple[Row, list[Row]]:
    columns = {
        "question_id": "string", "image": "image", "question": "string", "answer": ["string"],
        "segmentation": ["float32"], "bbox": ["float32"], "iscrowd": "int8", "file_name": "string",
    }  # fmt: skip
    rows = [
        {
            "question_id": str(i), "image": open_image(e.image), "question": "Please carefully observe the area.",
            "answer": [e.prompt, f"the {e.answers[0]}"], "segmentation": [1.0, 2.0, 3.0, 2.0, 3.0, 4.0],
            "bbox": [4.0, 6.0, 10.0 + i, 12.0], "iscrowd": 0, "file_name": f"COCO_train2014_{i:012d}_0.jpg",
        }
        for i, e in enumerate(asked(n // 2))
    ]  # fmt: skip
    return columns, rows


def _scienceqa(n: int) -> tuple[Row, list[Row]]:
    names = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    columns = dict.fromkeys(names, "string") | {"image": "image", "choices": ["string"], "answer": "int8"}
    rows = [
        dict.fromkeys(names, "") | {
            "question": e.prompt, "hint": "A scene." if i % 2 else "",
            "subject": ("natural science", "social science")[i % 2],
            "choices": ["nothing", e.answers[0]], "answer": 1, "image": open_image(e.image),
        }
        for i, e in enumerate(asked(n))
    ]  # fmt: skip
    return columns, rows


def _docvqa(n: int) -> tuple[Row, list[Row]]:
    columns = {
        "questionId": "string", "question": "string", "question_types": ["string"], "image": "image", "docId": "int64",
        "ucsf_document_id": "string", "ucsf_document_page_no": "string", "answers": ["string"], "data_split": "string",
    }  # fmt: skip
    rows = [
        {
            "questionId": str(i), "question": e.prompt, "question_types": ["layout"], "image": open_image(e.image),
            "docId": i, "ucsf_document_id": "a", "ucsf_document_page_no": "1",
            "answers": [e.answers[0], f"{e.answers[0]}s"], "data_split": "val",
        }
        for i, e in enumerate(asked(n))
    ]  # fmt: skip
    return columns, rows


# the task, the split that it evaluates, and what makes its rows
SETS: dict[str, tuple[str, Callable[[int], tuple[Row, list[Row]]]]] = {
    "chartqa": ("test", _chartqa),
    "textvqa_val": ("validation", _textvqa),
    "mmmu_val": ("validation", _mmmu),
    "pope": ("test", _pope),
    "refcoco_bbox_rec_val": ("val", _refcoco),
    "scienceqa_img": ("test", _scienceqa),
    "docvqa_val": ("validation", _docvqa),
}


def write(name: str, folder: Path, n: int = 8, split: str | None = None, train: bool = False) -> Path:
    """Write the data set of a task as save_to_disk does, and return its folder."""
    import datasets

    evaluated, rows_of = SETS[name]
    columns, rows = rows_of(n)
    features = datasets.Features({column: _feature(kind) for column, kind in columns.items()})
    cells = {column: [row[column] for row in rows] for column in columns}
    saved = datasets.Dataset.from_dict(cells, features=features)
    parts = {split or evaluated: saved} | ({"train": saved} if train else {})
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.DatasetDict(parts).save_to_disk(str(folder / name))
    finally:
        (datasets.disable_progress_bars if bars else datasets.enable_progress_bars)()
    return folder / name


def _feature(kind: object) -> Any:
    import datasets

    if isinstance(kind, list):
        return datasets.List(datasets.Value(kind[0]))
    return datasets.Image() if kind == "image" else datasets.Value(str(kind))
