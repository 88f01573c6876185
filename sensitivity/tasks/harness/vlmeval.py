"""A data set of VLMEvalKit as a task: the library makes prompts and scores in a separate process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from sensitivity.spec.errors import UserError
from sensitivity.tasks.datasets.source import DatasetFolder, Flaw, Part
from sensitivity.tasks.examples import images
from sensitivity.tasks.examples.types import Example, Metric, Task
from sensitivity.tasks.harness.documents import prompt_of

INSTALL = "pip install --no-deps ms-vlmeval==0.0.20 && pip install 'vlm-sensitivity[vlmeval]'"
LIMIT = 128  # tokens of an answer; the library leaves the limit to each model
TABLES = "LMUData"  # the library's environment variable for the folder of its tables
MODULE = "sensitivity.tasks.harness.vlmeval_process"

Answered = tuple[tuple[str, str], ...]  # ids of questions, each with an answer


@dataclass(frozen=True)
class DumpedImage:
    """An image that the library wrote from its table into a folder that is deleted when this process ends."""

    file: Path
    name: str  # equal for equal images

    def read_bytes(self) -> bytes:
        """The content of the image's file."""
        return self.file.read_bytes()

    def resolve(self) -> str:
        """A value that is equal for equal images."""
        return self.name

    def __str__(self) -> str:
        return self.name


@dataclass
class DatasetProcess:
    """The process of a data set, and a cache of its scores, since most plans repeat many answers of earlier plans."""

    name: str
    rows: Sequence[tuple[str, str, str]]  # id, hash of the images and kind of each question
    by: str  # what scores a single answer
    ask: Callable[..., Any]  # sends a request to the process and returns its answer, as JSON values
    images: Path  # the folder into which the library writes images
    known: dict[tuple[str, str], float] = field(default_factory=dict)  # scores by question and answer
    last: tuple[Answered, Mapping[str, float]] = ((), {})  # the answers whose figures were asked for last, and these

    @cached_property
    def number_of(self) -> dict[str, int]:
        """The row of each question in the table."""
        return {name: number for number, (name, _, _) in enumerate(self.rows)}

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """The score of each answer."""
        keys = [(example.id, answer) for answer, example in zip(answers, examples, strict=True)]
        if new := [key for key in dict.fromkeys(keys) if key not in self.known]:
            self.known |= dict(zip(new, self.ask("scores", answers=self._numbered(new)), strict=True))
        return [self.known[key] for key in keys]

    def score(self, answer: str, example: Example) -> float:
        """The score of one answer."""
        return self.scores([answer], [example])[0]

    def figure(self, name: str, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """One of the library's figures for all answers together; NaN if it does not have it for these answers."""
        given = tuple((example.id, answer) for answer, example in zip(answers, examples, strict=True))
        if self.last[0] != given:
            self.last = given, self.ask("figures", answers=self._numbered(given))
        return self.last[1].get(name, math.nan)

    def figures(self, examples: Sequence[Example]) -> list[str]:
        """The names of the library's figures for some questions."""
        return list(self.ask("figures", answers=self._numbered((one.id, one.answers[0]) for one in examples)))

    def _numbered(self, answers: Iterable[tuple[str, str]]) -> list[tuple[int, str]]:
        return [(self.number_of[name], text) for name, text in answers]


def vlmeval_task(name: str, folder: str | None, split: str, n: int, seed: int) -> Task:
    """n questions of a data set, from the library's folder LMUData or from another one with NAME.tsv."""
    served = _process_of(name, folder, installed())
    part = Part("all", split, hashed=True)  # the library has no training questions
    examples, left_out = _drawn(served, part, n, seed, Path(folder or "LMUData"))
    metrics: dict[str, Metric] = {one: partial(served.figure, one) for one in served.figures(examples)}
    notes = (f"scored by VLMEvalKit: {served.by}", f"the library names no limit of tokens: answers end after {LIMIT}")
    return Task(
        name,
        examples,
        served.score,
        max_new_tokens=LIMIT,
        metrics=metrics,
        notes=(*notes, *left_out),
        together=served.scores,
    )


def check(name: str) -> None:
    """Raise an error unless the library is installed and the name can be that of a table."""
    installed()
    if Path(name).name != name:
        raise UserError(f"vlmeval takes the name of a data set, such as vlmeval:MMStar, and not {name}")


def installed() -> Path:
    """The folder of VLMEvalKit, or an error that says how to install it; it is not imported here."""
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data sets of VLMEvalKit need the extra vlmeval; type {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


@lru_cache(maxsize=8)
def _process_of(name: str, folder: str | None, package: Path) -> DatasetProcess:
    """The process of a data set; it is kept, since several steps of a sweep ask for it."""
    place = Path(folder or os.environ.get(TABLES) or "~/LMUData").expanduser().absolute()
    if not place.is_dir():
        raise UserError(
            f"there is no folder {place} with the table {name}.tsv; VLMEvalKit keeps its tables in LMUData, and"
            f" vlmeval:{name}:FOLDER names another folder"
        )
    home = tempfile.TemporaryDirectory(prefix="vlmeval-")
    ask = _started(name, place, Path(home.name))
    try:
        opened = ask("open", name=name, folder=str(place), package=str(package), published=folder is None)
        rows = [tuple(row) for row in opened["rows"]]
        served = DatasetProcess(name, rows, opened["by"], ask, Path(home.name) / "images")
        if len(served.number_of) < len(rows):
            raise UserError(f"{place / name}.tsv has two questions with one index; every question needs its own")
    except BaseException:
        home.cleanup()
        raise
    served.images.mkdir()
    weakref.finalize(served, home.cleanup)
    return served


def _started(name: str, place: Path, home: Path) -> Callable[..., Any]:
    """Start the process of a data set, which ends when its input is closed; return the function that asks it."""
    environment = {**os.environ, TABLES: str(place), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(one).absolute()) for one in sys.path if one)
    errors = (home / "errors").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        cwd=home,  # the library writes some files where it was started
        env=environment,
        start_new_session=True,  # so that interrupting the sweep does not interrupt it
    )

    def ask(do: str, **values: object) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which the error below reports
            process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            raise UserError(f"the process of vlmeval:{name} has ended: {_last_line(errors)}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(_sentence(name, answer))
        return answer["answer"]

    weakref.finalize(ask, _end, process, errors)
    return ask


def _end(process: subprocess.Popen[str], errors: IO[str]) -> None:
    """Close the process's input, which ends it."""
    for one in (process.stdin, process.stdout, errors):
        if one is not None:
            with contextlib.suppress(OSError):
                one.close()
    process.wait()


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return lines[-1] if lines else "without a message"


def _sentence(name: str, answer: Mapping[str, str]) -> str:
    """An error of the process as a sentence that names the data set."""
    text = answer["error"] or f"VLMEvalKit fails on it ({answer['why']})"
    return text if name in text else f"vlmeval:{name} cannot be swept: {text}"


def _drawn(
    served: DatasetProcess, part: Part, n: int, seed: int, folder: Path
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """n questions of a part drawn with the seed, in the order of the table, and notes on those left out."""
    source = DatasetFolder(f"vlmeval:{served.name}", folder, "fetch the table again")
    order = np.random.default_rng(seed).permutation(len(served.rows)).tolist()
    waiting = [number for number in order if part.contains(served.rows[number][1])]
    examples: dict[int, Example] = {}
    flaws: list[Flaw] = []
    # flawed questions are replaced by the next ones
    while waiting and len(examples) < n:
        some, waiting = waiting[: n - len(examples)], waiting[n - len(examples) :]
        asked = served.ask("asked", numbers=some, images=str(served.images))
        for number, one in zip(some, asked, strict=True):
            example = _example(served.rows[number], one)
            if why := one.get("flaw") or _why_unusable(example):
                flaws.append(Flaw(served.rows[number][0], f"no usable question ({why})"))
            else:
                examples[number] = example
    notes = source.flaw_notes(flaws, len(flaws) + len(examples))
    if not examples:
        raise UserError(f"{source.name} has no {part.split} examples in {folder}")
    return tuple(examples[number] for number in sorted(examples)), (*part.note, *notes)


def _example(row: tuple[str, str, str], asked: Mapping[str, Any]) -> Example:
    """The example of a question; `_why_unusable` finds one without an image or an answer."""
    name, cluster, kind = row
    pieces = asked.get("pieces", [])
    files = [
        DumpedImage(Path(one["value"]), f"{cluster} {i}") for i, one in enumerate(pieces) if one["type"] == "image"
    ]
    prompt, among = prompt_of([one["value"] if one["type"] == "text" else None for one in pieces])
    answers = tuple(asked.get("answers", ()))
    first: Any = files[0] if files else None
    return Example(name, cluster, kind, first, prompt, answers, more=tuple(files[1:]), pieces=among)


def _why_unusable(example: Example) -> str:
    """Why a question cannot be asked; "" where it can."""
    if example.image is None:
        return "it shows no image"
    if not example.answers:
        return "it has no right answer"
    return next(filter(None, map(images.why_unusable, example.images)), "") or ""
