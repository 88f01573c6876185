"""Loads one data set of VLMEvalKit without the rest of the library, and reads its prompts and right answers.

This module is imported only in a separate process, since the library changes settings of the process that imports it.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import multiprocessing
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Protocol

import pandas as pd

from sensitivity.spec.errors import UserError, reason

SEARCHED_FIRST = ("image_mcq", "image_yorn", "image_vqa")  # they hold most data sets and need few packages
# whether a table of the user's has options -> module and class of the library for it
CUSTOM = {True: ("image_mcq", "CustomMCQDataset"), False: ("image_vqa", "CustomVQADataset")}
SHOWN = ("image", "text")  # kinds of pieces of a prompt
JUDGE = "it asks another model to judge answers, which is not the same twice; choose a data set that is scored by rule"


class Dataset(Protocol):
    """The part of the library's ImageBaseDataset that is used here."""

    data: pd.DataFrame
    img_root: str

    def build_prompt(self, line: pd.Series) -> list[dict[str, str]]: ...

    def evaluate(self, eval_file: str, **judge_kwargs: object) -> object: ...


class DatasetClass(Protocol):
    """A class of the library for the data sets whose names it lists."""

    TYPE: str
    MODALITY: str
    DATASET_MD5: dict[str, str]

    def __call__(self, dataset: str) -> Dataset: ...

    def supported_datasets(self) -> Sequence[str]: ...


class _Missing(UserError):
    """A file that the library would download."""


def load_dataset(package: Path, name: str, folder: Path, published: bool) -> Dataset:
    """The data set as the library makes it from FOLDER/NAME.tsv; if `published`, the file must be the published one."""
    _without_the_rest(package)
    dataset_class = _class_of(package, name, folder)
    modality, several_turns = dataset_class.MODALITY, dataset_class.TYPE == "MT"
    if modality != "IMAGE" or several_turns:
        asks = "in several turns" if several_turns else f"about {modality.lower()}s"
        raise UserError(f"vlmeval:{name} asks {asks}; choose a data set of single questions about images")
    if not published:
        dataset_class.DATASET_MD5 = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dataset_class(dataset=name)
    except _Missing:
        raise
    except Exception as error:  # of pandas, or of the data set's own code
        raise UserError(f"VLMEvalKit cannot read {folder} as the data of {name} ({reason(error)})") from error


def _without_the_rest(package: Path) -> None:
    """Let modules of the library be imported without the `__init__` of its packages; forbid downloads and pools.

    Those files import every model and every data set, and turn off the checks of certificates.
    """
    for name, path in (("vlmeval", package), ("vlmeval.dataset", package / "dataset")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    smp, files = importlib.import_module("vlmeval.smp"), importlib.import_module("vlmeval.smp.file")
    for module in (smp, files):
        module.download_file = _download  # type: ignore[attr-defined]
        module.file_size = lambda *_: 0  # type: ignore[attr-defined]  # so that no copy of a large table is written beside it
    multiprocessing.Pool = _one_thread


def _one_thread(*_: object, **__: object) -> ThreadPool:
    """Replaces a pool of sixteen processes, which the library would start again for every few answers."""
    return ThreadPool(1)


def _download(url: str, filename: str | None = None) -> None:
    file = Path(filename or url.rpartition("/")[2])
    if file.is_file():
        raise _Missing(
            f"{file} is not the published file, or not all of it; fetch it again, type curl -L -o {file} {url}, or name"
            " its folder if the table is meant to differ: vlmeval:NAME:FOLDER"
        )
    how = f"; type curl -L -o {file} {url}" if "://" in url else ""
    raise _Missing(f"the data of vlmeval:{file.stem} are not on this machine: there is no {file}{how}")


def _class_of(package: Path, name: str, folder: Path) -> DatasetClass:
    """The class of a data set: its own, or the library's class for tables of users if the name is unknown."""
    lacking: Exception | None = None
    for module in _modules(package, name):
        try:
            loaded = importlib.import_module(f"vlmeval.dataset.{module}")
        except Exception as error:  # most lack a package; some of the others cannot be imported alone
            lacking = lacking if isinstance(lacking, ImportError) else error
            continue
        _without_judge()
        for one in vars(loaded).values():
            if isinstance(one, type) and name in getattr(one, "supported_datasets", list)():
                return one  # type: ignore[return-value]  # a class of the library, which has no type hints
    if isinstance(lacking, ImportError) and lacking.name:
        needed = lacking.name.partition(".")[0]
        raise UserError(f"vlmeval:{name} needs the package {needed}; type pip install {needed}")
    if lacking is not None:
        raise UserError(f"vlmeval:{name} cannot be imported without all other data sets ({reason(lacking)})")
    table = folder / f"{name}.tsv"
    if not table.is_file():
        raise UserError(f"VLMEvalKit has no data set '{name}', and there is no {table} of your own")
    columns = set(pd.read_csv(table, sep="\t", nrows=1).columns)
    if not {"index", "question", "answer"} <= columns or not {"image", "image_path"} & columns:
        raise UserError(f"{table} needs the columns index, question, answer and image, as every table of VLMEvalKit")
    module, chosen = CUSTOM[{"A", "B"} <= columns]
    found: DatasetClass = getattr(importlib.import_module(f"vlmeval.dataset.{module}"), chosen)
    _without_judge()
    return found


def _modules(package: Path, name: str) -> Iterator[str]:
    """The modules whose code has the name of a data set; those that hold most data sets come first."""
    quoted = re.compile(rf"""["']{re.escape(name)}["']""")
    files = sorted((package / "dataset").rglob("*.py"), key=lambda file: (file.stem not in SEARCHED_FIRST, str(file)))
    for file in files:
        if file.name != "__init__.py" and quoted.search(file.read_text(encoding="utf-8", errors="replace")):
            yield ".".join(file.relative_to(package / "dataset").with_suffix("").parts)


def _without_judge() -> None:
    """Replace the function that connects to a judge, in every module that has imported it by its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vlmeval.") and hasattr(module, "build_judge"):
            module.build_judge = _build_judge  # type: ignore[attr-defined]


def _build_judge(**_: object) -> None:
    raise UserError(JUDGE)


def rows_of(dataset: Dataset) -> list[tuple[str, str, str]]:
    """The id, the hash of the images and the kind of every question."""
    data = dataset.data
    shown = data["image"] if "image" in data else data["image_path"]
    kinds = _kinds(data)
    clusters = [hashlib.sha256(str(one).encode()).hexdigest()[:16] for one in shown]
    return list(zip(map(str, data["index"]), clusters, kinds, strict=True))


def _kinds(data: pd.DataFrame) -> list[str]:
    """The kind of each question, from a column with few different texts."""
    from sensitivity.tasks.harness.documents import KINDS, MAX_KINDS

    for name in (*KINDS, "l2-category", "split"):
        if name in data and data[name].map(type).eq(str).all() and 1 < data[name].nunique() <= MAX_KINDS:
            return [str(one) for one in data[name]]
    return ["all"] * len(data)


def asked(dataset: Dataset, number: int, images: Path) -> dict[str, object]:
    """The prompt of a question as pieces, with its images in a folder of ours, and its right answers."""
    dataset.img_root = str(images)
    line = dataset.data.iloc[number]
    pieces = dataset.build_prompt(line)
    if strange := {one["type"] for one in pieces} - set(SHOWN):
        raise UserError(f"it shows {' and '.join(sorted(strange))}, and only images can be shown")
    shown = [{**one, "value": os.path.abspath(one["value"])} if one["type"] == "image" else one for one in pieces]
    return {"pieces": shown, "answers": _right(line)}


def first_answered(dataset: Dataset, count: int) -> list[tuple[int, str]]:
    """The first `count` questions that have a right answer, each with that answer."""
    every = ((number, _right(dataset.data.iloc[number])) for number in range(len(dataset.data)))
    return list(itertools.islice(((number, right[0]) for number, right in every if right), count))


def _right(line: pd.Series) -> list[str]:
    """The right answers to a question."""
    from vlmeval.smp import toliststr

    given = toliststr(line["answer"]) if "answer" in line and pd.notna(line["answer"]) else []
    return list(dict.fromkeys(str(one) for one in given if str(one).strip()))
