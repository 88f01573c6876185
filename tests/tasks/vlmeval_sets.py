"""Small data sets in the exact tables that VLMEvalKit reads, about scenes that the embedded models know."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

Row = dict[str, Any]


def rows(name: str, n: int) -> Iterator[Row]:
    """The questions of a table; those of one scene are about one image, as in the real sets."""
    examples = task("vqa", n=n).examples
    for i, example in enumerate(examples):
        right, image = example.answers[0], encoded(example)
        asked = {"index": i, "question": example.prompt, "image": image}
        match name:
            case "A-OKVQA":
                yield {**asked, "A": right, "B": "green", "answer": "A", "category": ("one", "two")[i % 2]}
            case "MMMU_DEV_VAL":
                where = {"question": f"Look at <image 1> and say: {example.prompt}", "image": repr([image])}
                options = {
                    "A": "x",
                    "B": right,
                    "C": "y",
                    "D": "z",
                    "answer": "B",
                    "split": ("dev", "validation")[i % 2],
                }
                yield {**asked, **where, **options, "category": "Art", "l2-category": "Art", "topic_difficulty": "Easy"}
            case "POPE":
                yield {**asked, "answer": ("Yes", "No")[i % 2], "category": ("random", "popular")[i % 2]}
            case "MME":  # two questions about each image
                group = {"category": ("color", "count")[i // 2 % 2], "image_path": f"{i // 2}.png"}
                group["image"] = encoded(examples[i // 2 * 2])
                yield {**asked, "answer": ("Yes", "No")[i % 2], **group}
            case "ChartQA_TEST":
                yield {**asked, "answer": right, "split": ("test_human", "test_augmented")[i % 2]}
            case "DocVQA_VAL":
                yield {**asked, "answer": repr([right, "another"])}
            case "TextVQA_VAL":
                yield {**asked, "answer": repr([right] * 10)}


SETS = ("A-OKVQA", "MMMU_DEV_VAL", "POPE", "MME", "ChartQA_TEST", "DocVQA_VAL", "TextVQA_VAL")


def write(name: str, folder: Path, n: int = 10) -> None:
    """Write FOLDER/NAME.tsv."""
    every = list(rows(name, n))
    with (folder / f"{name}.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(every[0]), delimiter="\t")
        table.writeheader()
        table.writerows(every)


def encoded(example: Example) -> str:
    """The image of an example as a cell of a table."""
    file = io.BytesIO()
    open_image(example.image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
