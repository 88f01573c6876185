"""Finds VLMEvalKit's score of each answer in the tables that its evaluation writes, or in its figures."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity.spec.errors import UserError
from sensitivity.tasks.harness.vlmeval_library import Dataset

CLOSE = 1e-6
READERS: dict[str, Callable[[Path], object]] = {
    ".tsv": lambda file: pd.read_csv(file, sep="\t"),
    ".csv": pd.read_csv,
    ".pkl": pd.read_pickle,
    ".json": pd.read_json,
}
ALONE = 6  # questions that are evaluated one by one, to test whether a figure of all is the mean of theirs
WHOLE = ("overall", "none")  # names of splits that have every question

Answered = Sequence[tuple[int, str]]  # the number of a question, and an answer to it


@dataclass(frozen=True)
class Figure:
    """A number that the library computes from many answers, and which of the questions it covers."""

    value: float
    about: tuple[bool, ...]


@dataclass(frozen=True)
class Outcome:
    """What an evaluation returns (figures by split and name) and writes (columns with a number for each question)."""

    figures: Mapping[tuple[str, str], Figure]
    columns: Mapping[str, Sequence[float]]

    def overall(self) -> dict[str, float]:
        """The figures that cover all questions."""
        return {name: figure.value for (_, name), figure in self.figures.items() if all(figure.about)}


@dataclass
class Evaluation:
    """The library's evaluation of answers to questions of one data set."""

    dataset: Dataset
    column: str = ""  # of a written table, with a score for each question; "" if each question is evaluated alone
    figure: str = ""  # the figure that is the mean of the scores; "" if there is none
    scale: float = 1.0  # by which the figure of a question alone is divided: 100 for percentages

    def choose(self, right: Answered) -> str:
        """Find what scores a single answer, from some questions with right answers; return its name."""
        if not right:
            raise UserError("none of its questions has a right answer; choose another data set")
        is_right = np.random.default_rng(0).random(len(right)) < 0.6
        wrong = [(number, "") for number, _ in right]
        mixed = [right[i] if is_right[i] else wrong[i] for i in range(len(right))]
        seen = [self.run(answers) for answers in (right, wrong, mixed)]
        columns = [name for name in seen[0].columns if _orders([one.columns.get(name) for one in seen], is_right)]
        for self.column in columns:
            if figure := _figure_of_mean(self.column, seen):
                self.figure = figure
                return f"the column {self.column} of its tables, whose mean is its figure {figure}"
        self.column = ""
        if self._choose_figure_alone(right[:ALONE], mixed[:ALONE]):
            return f"its figure {self.figure} of each question alone"
        if columns:
            self.column = columns[0]
            return f"the column {self.column} of its tables (none of its figures is a mean over questions)"
        raise UserError(
            "its evaluation has no value for each question that tells right answers from wrong ones, so that plans"
            " could not be compared on the same questions; choose another data set"
        )

    def scores(self, answers: Answered) -> list[float]:
        """The score of each answer."""
        if not self.column:
            return [self._alone(one) for one in answers]
        # each question is one row of a table, so two answers to one question need two tables
        found: dict[tuple[int, str], float] = {}
        for some in _each_question_once(answers):
            columns = self.run(some).columns
            if self.column not in columns:
                raise UserError(f"its evaluation gave no {self.column} to some answers")
            found |= dict(zip(some, columns[self.column], strict=True))
        return [found[one] for one in answers]

    def figures(self, answers: Answered) -> dict[str, float]:
        """The library's figures for all answers together."""
        return {" ".join(filter(None, name)): figure.value for name, figure in self.run(answers).figures.items()}

    def run(self, answers: Answered) -> Outcome:
        """Evaluate answers; a figure may be missing if it needs questions that are not among them."""
        numbers = [number for number, _ in answers]
        frame = self.dataset.data.iloc[numbers].drop(columns="image", errors="ignore").reset_index(drop=True)
        frame["prediction"] = [text for _, text in answers]
        failed: Exception | None = None
        result: object = None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model_answers.pkl"  # a table of text would turn an answer such as 007 into a number
            frame.to_pickle(file)
            try:
                result = self.dataset.evaluate(str(file), model="exact_matching", nproc=1)
            except UserError:
                raise
            except Exception as error:
                # its tables may be written nevertheless: MME fails later if the second question of a pair is missing
                failed = error
            tables = list(_tables(Path(folder), file))
        columns: dict[str, list[float]] = {}
        for table in tables:
            columns |= _numbers(table, frame)
        if failed is not None and not columns:
            raise failed
        return Outcome(_figures(result, frame), columns)

    def _alone(self, one: tuple[int, str]) -> float:
        """The score of an answer whose question is evaluated alone."""
        figures = self.run([one]).overall()
        if self.figure not in figures:
            raise UserError(f"its evaluation gave no {self.figure} to the answer '{one[1][:40]}'")
        return figures[self.figure] / self.scale

    def _choose_figure_alone(self, right: Answered, mixed: Answered) -> bool:
        """Choose a figure that is the mean of the figures of questions evaluated one by one; False if there is none."""
        with contextlib.suppress(Exception):  # a figure of pairs or groups of questions cannot be computed from one
            whole, best = self.run(mixed).overall(), self.run(right).overall()
            each = [self.run([one]).overall() for one in mixed]
            for name in sorted(whole, key=_overall_first):
                values = [one.get(name, math.nan) for one in each]
                if math.isclose(float(np.mean(values)), whole[name], abs_tol=CLOSE) and best[name] > min(values):
                    self.figure, self.scale = name, 100.0 if best[name] > 1 else 1.0
                    return True
        return False


def _orders(seen: Sequence[Sequence[float] | None], is_right: np.ndarray) -> bool:
    """Whether a column gives right answers more than wrong ones, whatever the answers to other questions are."""
    if any(values is None for values in seen):
        return False
    right, wrong, mixed = (np.array(values) for values in seen)
    independent = np.allclose(mixed, np.where(is_right, right, wrong))
    return bool((right >= wrong).all() and right.mean() > wrong.mean() and independent)


def _figure_of_mean(column: str, seen: Sequence[Outcome]) -> str:
    """The figure that equals the mean of a column over the figure's questions in every split; "" if there is none."""
    names = sorted({name for _, name in seen[0].figures}, key=_overall_first)
    for name, scale in itertools.product(names, (1.0, 100.0)):
        if all(
            math.isclose(scale * float(np.mean(np.array(one.columns[column])[list(figure.about)])), figure.value,
                         abs_tol=CLOSE)
            for one in seen
            for (_, of), figure in one.figures.items()
            if of == name
        ):  # fmt: skip
            return name
    return ""


def _overall_first(name: str) -> tuple[bool, str]:
    """A sort key: overall figures come before those of a category, which may cover all probed questions by chance."""
    return "overall" not in name.lower(), name


def _each_question_once(answers: Answered) -> Iterator[list[tuple[int, str]]]:
    """The answers in several lists, none of which has a question twice."""
    waiting = list(dict.fromkeys(answers))
    while waiting:
        first: dict[int, tuple[int, str]] = {}
        for one in waiting:
            first.setdefault(one[0], one)
        yield list(first.values())
        waiting = [one for one in waiting if first[one[0]] != one]


def _tables(folder: Path, given: Path) -> Iterator[pd.DataFrame]:
    """The tables that an evaluation wrote."""
    for file in sorted(folder.rglob("*")):
        if file != given and file.suffix in READERS:
            with contextlib.suppress(ValueError, LookupError, TypeError):  # not a table
                table = READERS[file.suffix](file)
                if isinstance(table, pd.DataFrame):
                    yield table


def _numbers(table: pd.DataFrame, frame: pd.DataFrame) -> dict[str, list[float]]:
    """The columns of a table that are not the data set's own and have a finite number for each question."""
    if "index" not in table or table["index"].duplicated().any():
        return {}
    rows = table.assign(index=table["index"].astype(str)).set_index("index")
    names = frame["index"].astype(str)
    if not set(names) <= set(rows.index):
        return {}
    rows = rows.loc[list(names)]
    columns = {name: rows[name] for name in rows if name not in frame and pd.api.types.is_numeric_dtype(rows[name])}
    return {
        str(name): [float(value) for value in values]
        for name, values in columns.items()
        if np.isfinite(values.astype(float)).all()
    }


def _figures(result: object, frame: pd.DataFrame) -> dict[tuple[str, str], Figure]:
    """The numbers that an evaluation returns, each with its split and name."""
    every = (True,) * len(frame)
    found: dict[tuple[str, str], Figure] = {}
    if isinstance(result, pd.DataFrame):
        for _, row in result.iterrows():
            split = str(row.get("split", ""))
            about = every
            if len(result) > 1 and split.lower() not in WHOLE:
                if "split" not in frame or split not in set(frame["split"].astype(str)):
                    continue  # the row of a category, which, unlike a split's, does not say which questions it covers
                about = tuple(frame["split"].astype(str) == split)
            for name, value in row.items():
                if name != "split":
                    found |= _number(("" if about == every else split, str(name)), value, about)
    elif isinstance(result, Mapping):
        for name, value in result.items():
            inner = value if isinstance(value, Mapping) else {"": value}
            for more, one in inner.items():
                found |= _number(("", f"{name} {more}".strip()), one, every)
    return found


def _number(name: tuple[str, str], value: object, about: tuple[bool, ...]) -> dict[tuple[str, str], Figure]:
    with contextlib.suppress(TypeError, ValueError):  # a text, or a list
        number = float(value) if isinstance(value, Real | np.generic | str) else math.nan
        if math.isfinite(number):
            return {name: Figure(number, about)}
    return {}


def evaluation_of(dataset: Dataset, name: str) -> Evaluation:
    """The evaluation of a data set, set to write its tables as text."""
    os.environ["PRED_FORMAT"], os.environ["EVAL_FORMAT"] = "tsv", "csv"
    if type(dataset).evaluate.__qualname__.startswith("CustomVQADataset"):
        raise UserError(f"VLMEvalKit has no rule for {name}, a table of your own without options A and B")
    return Evaluation(dataset)
